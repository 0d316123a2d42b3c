"""Compilers, exporters and function transforms see what the model computes, whatever state it is in."""

import io
import os
import shutil

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from models_swin import SwinTransformer

SLOW = pytest.mark.slow
SHAPE = dict(img_size=16, patch_size=1, in_chans=1, embed_dim=8, depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2))
SHAPE |= dict(window_size=(8, 4, 4, 2), num_classes=7)  # several windows at stages 1 and 2


@pytest.fixture
def model() -> SwinTransformer:
    """With position biases and a head that would show if they were wrong."""
    torch.manual_seed(0)
    model = SwinTransformer(**SHAPE).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias_table") or name == "head.weight":
                parameter.normal_(std=0.5)
    return model


@pytest.fixture
def imgs() -> torch.Tensor:
    return torch.randn(5, 1, 16, 16, generator=torch.Generator().manual_seed(1))


def capture_whole(model, imgs):
    """The graph that torch.compile takes, without generating code."""
    torch._dynamo.reset()
    return torch.compile(model, fullgraph=True, backend="eager")


def torch_export(model, imgs):
    return torch.export.export(model, (imgs,), dynamic_shapes=({0: torch.export.Dim("batch")},)).module()


def jit_trace(model, imgs):
    return torch.jit.trace(model, imgs, check_inputs=[(imgs.flip(0),)])  # and it checks itself


def run_onnx(content: bytes):
    session = pytest.importorskip("onnxruntime").InferenceSession(content)
    return lambda imgs: torch.from_numpy(session.run(None, {"images": imgs.numpy()})[0])


def onnx_by_trace(model, imgs):
    pytest.importorskip("onnx")
    buffer = io.BytesIO()
    open_batch = {name: {0: "batch"} for name in ("images", "logits")}
    torch.onnx.export(
        model, (imgs,), buffer, dynamo=False, input_names=["images"], output_names=["logits"], dynamic_axes=open_batch
    )
    return run_onnx(buffer.getvalue())


def onnx_by_dynamo(model, imgs):
    pytest.importorskip("onnxscript")
    program = torch.onnx.export(
        model, (imgs,), dynamo=True, verbose=False, input_names=["images"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
    )  # fmt: skip
    return run_onnx(program.model_proto.SerializeToString())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
@pytest.mark.parametrize("gradients", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize(
    "export",
    [
        pytest.param(capture_whole, marks=SLOW),
        pytest.param(torch_export, marks=SLOW),
        jit_trace,
        onnx_by_trace,
        pytest.param(onnx_by_dynamo, marks=SLOW),
    ],
)
def test_exported_models_compute_the_same(model, imgs, export, gradients, warm):
    """Made with two images, run with one and with five. Position biases are learned, so that gradients matter."""
    others = torch.randn(5, 1, 16, 16)
    if warm:  # after training and evaluation
        model(imgs).sum().backward()
        with torch.inference_mode():
            model(imgs)
    with torch.set_grad_enabled(gradients):
        exported = export(model, imgs[:2])
        for batch in (1, 5):
            torch.testing.assert_close(exported(others[:batch]), model(others[:batch]), rtol=1e-4, atol=1e-4)


@SLOW
@pytest.mark.filterwarnings("ignore")
def test_an_exported_model_is_of_one_size(model, imgs):
    """Layouts are numbers: an open height or width is refused, and so are images of another size."""
    model.patch_embed.strict_img_size = False
    sides = {2: torch.export.Dim("height", min=8, max=64), 3: torch.export.Dim("width", min=8, max=64)}
    with pytest.raises(Exception, match=r"height.*specialized"):
        torch.export.export(model, (imgs,), dynamic_shapes=(sides,))
    traced = torch.jit.trace(model, imgs)
    for size in ((24, 16), (16, 8)):
        with pytest.raises(RuntimeError):
            traced(torch.zeros(1, 1, *size))


@SLOW
@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="needs a C++ compiler")
def test_compiled_code_computes_the_same(model, imgs):
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        for batch in (1, 5):
            torch.testing.assert_close(compiled(imgs[:batch]), model(imgs[:batch]), rtol=1e-4, atol=1e-4)


def test_features_are_captured_whole(model, imgs):
    torch._dynamo.reset()
    features = torch.compile(model.forward_intermediates, fullgraph=True, backend="eager")
    for ours, theirs in zip(features(imgs)[1], model.forward_intermediates(imgs)[1]):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_tensorboard_draws_the_graph(model, imgs, tmp_path, capfd):
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(tmp_path) as writer:
        writer.add_graph(model, imgs)  # a trace that is checked against the model
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) > 10_000
    assert "Error" not in capfd.readouterr().out


def test_gradients_of_single_images(model, imgs):
    """`torch.func` sees the same model as `backward` does, which on a CPU has a kernel of its own."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}

    def loss(parameters, img):
        return torch.func.functional_call(model, parameters, (img[None],)).square().mean()

    detached = {name: parameter.detach() for name, parameter in trained.items()}
    per_image = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(detached, imgs)
    for i in (0, 4):
        expected = torch.autograd.grad(model(imgs[i : i + 1]).square().mean(), list(trained.values()))
        for name, gradient in zip(trained, expected):
            torch.testing.assert_close(per_image[name][i], gradient, rtol=1e-3, atol=1e-5, msg=name)


def test_gradients_by_torch_func_of_a_model_that_trains(model, imgs):
    """Though its bias tables have gradients, of which torch.func hides the sign from PyTorch's choice of a kernel."""
    [expected] = torch.autograd.grad(model(imgs.requires_grad_()).sum(), imgs)
    imgs = imgs.detach()
    torch.testing.assert_close(torch.func.grad(lambda x: model(x).sum())(imgs), expected, rtol=1e-3, atol=1e-6)
    jacobian = torch.func.jacrev(model)(imgs[:1])
    torch.testing.assert_close(jacobian.sum((0, 1))[0], expected[0], rtol=1e-3, atol=1e-6)
    stacked, buffers = torch.func.stack_module_state([model, model])
    ensemble = torch.func.vmap(
        lambda parameters, buffers: torch.func.functional_call(model, (parameters, buffers), (imgs,))
    )(stacked, buffers)
    torch.testing.assert_close(ensemble, model(imgs).expand(2, -1, -1), rtol=1e-4, atol=1e-5)


def test_many_gradients_at_once_are_refused_with_the_way_to_have_them(model, imgs):
    def jacobian():
        return torch.autograd.functional.jacobian(model, imgs[:1], vectorize=True)

    with pytest.raises(RuntimeError, match=r"is_grads_batched=True, .*sdpa_kernel\(SDPBackend.MATH\)"):
        jacobian()
    with sdpa_kernel(SDPBackend.MATH):
        torch.testing.assert_close(jacobian(), torch.func.jacrev(model)(imgs[:1]), rtol=1e-3, atol=1e-6)


def squared_gradient(model, imgs):
    imgs = imgs.clone().requires_grad_()
    [gradient] = torch.autograd.grad(model(imgs).square().sum(), imgs, create_graph=True)
    return imgs, gradient.square().sum()


def test_second_derivatives_are_refused_with_the_way_to_have_them(model, imgs):
    with pytest.raises(RuntimeError, match=r"first derivatives only.*sdpa_kernel\(SDPBackend.MATH\)"):
        squared_gradient(model, imgs)


def test_second_derivatives(model, imgs):
    """Against differences of first ones, in float64."""
    model, imgs = model.double(), imgs[:2].double()
    direction = torch.randn(imgs.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    with sdpa_kernel(SDPBackend.MATH):
        given, value = squared_gradient(model, imgs)
        [second] = torch.autograd.grad(value, given)
        ahead, behind = (squared_gradient(model, imgs + step * direction)[1] for step in (1e-5, -1e-5))
        _, forward = torch.func.jvp(lambda x: model(x), (imgs,), (direction,))
        numeric = (model(imgs + 1e-6 * direction) - model(imgs - 1e-6 * direction)) / 2e-6
    assert (second * direction).sum().item() == pytest.approx((ahead - behind).item() / 2e-5, rel=1e-4)
    torch.testing.assert_close(forward, numeric, rtol=1e-4, atol=1e-6)


def test_first_derivatives_do_not_depend_on_the_kernel(model, imgs):
    """The kernel that `sdpa_kernel` asks for is taken, and gives what ours gives."""
    gradients = []
    for backends in ([SDPBackend.MATH], list(SDPBackend.__members__.values())):
        with sdpa_kernel([backend for backend in backends if backend != SDPBackend.ERROR]):
            model.zero_grad()
            model(imgs).square().mean().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-3, atol=1e-6, msg=name)
