"""One epoch of pretraining (MixMAE, section 3)."""

from util.run.optim import adjust_learning_rate, autocast, backward, clip_and_step, last_learning_rate
from util.run.session import Run
from util.seeding import keyed_generator, seed_all


def train_one_epoch(run: Run) -> float:
    """Train on what is left of the current epoch; returns the last learning rate.

    Raises:
        NonFiniteError, SystemExit: see `Run.finish_step`.
    """
    config, state, progress = run.config, run.state, run.state.progress
    run.model.train()
    lr = last_learning_rate(progress.epoch, run.steps_per_epoch, config)  # for an epoch that was resumed at its end
    meter, batches = run.start_epoch()
    while progress.step_in_epoch < run.steps_per_epoch:
        lr = adjust_learning_rate(state.optimizer, progress.fraction(run.steps_per_epoch), config)
        loss, batch = 0.0, []
        for micro in range(config.accum_iter):
            imgs, _ = meter.next_batch(batches)
            keys = run.step_keys(micro)
            batch_size = len(imgs) if config.mask_per_pair else None
            mask = state.model.random_masking(config.mask_ratio, keyed_generator(*keys), batch_size)
            keys = (*keys, "drop path")  # independent of the mask
            seed_all(*keys)
            batch.append({"imgs": imgs, "mask": mask, "keys": keys})
            with run.gradients_in_sync(micro):
                with autocast(config.precision, run.device):
                    micro_loss, _, _ = run.model(run.normalize(imgs.to(run.device, non_blocking=True)), mask=mask)
                micro_loss = micro_loss / config.accum_iter
                backward(micro_loss, state.scaler)
            loss = loss + micro_loss.detach()
        run.check_last_step()
        grad_norm = clip_and_step(state.optimizer, state.scaler, state.model.parameters(), config.clip_grad)
        run.finish_step(meter, lr, loss, grad_norm, batch)
    return lr
