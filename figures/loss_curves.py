"""Draws figures/loss_curves.png, the loss of the runs in figures/reference: `python figures/loss_curves.py`."""

import json
from pathlib import Path

from matplotlib.figure import Figure

FOLDER = Path(__file__).resolve().parent
WIDTH, HEIGHT = 1000, 420  # in pixels of a README; the file has twice as many
COLOURS = ("#2f7fe8", "#f0821e", "#3a9d5d", "#b04fc4")
IMAGES = {
    "quickstart": "8,000 images",
    "fashion_mnist": "20,000 images",
}  # of training, which a reference does not hold

figure = Figure((WIDTH / 72, HEIGHT / 72), dpi=144, layout="constrained")
axes = figure.add_subplot(
    xlabel="epochs", ylabel="loss of normalised pixels (running mean)", title="Pretraining losses of our own runs"
)
axes.axhline(1, color="#7a7f87", linewidth=0.8, linestyle=":")
axes.annotate("every pixel predicted as the mean of its cell", (1, 1), xycoords=("axes fraction", "data"),
              xytext=(-4, 4), textcoords="offset points", ha="right", color="#7a7f87")  # fmt: skip
for path, colour in zip(sorted(FOLDER.glob("reference/*.json"), reverse=True), COLOURS):
    reference = json.loads(path.read_text())
    config, epochs, loss = (reference[name] for name in ("config", "epochs", "loss"))
    side = "x".join(map(str, config["input_size"]))
    label = f"{reference['name']}: {config['model']} at {side}, {IMAGES[reference['name']]}, {config['epochs']} epochs"
    axes.plot(epochs, loss, color=colour, linewidth=1.8, label=label)
    axes.annotate(f"{loss[-1]:.3f}", (epochs[-1], loss[-1]), xytext=(5, -3), textcoords="offset points", color=colour)
axes.set_xlim(0)
axes.spines[["top", "right"]].set_visible(False)
axes.grid(alpha=0.25, linewidth=0.6)
axes.legend(frameon=False)
figure.savefig(FOLDER / "loss_curves.png")
