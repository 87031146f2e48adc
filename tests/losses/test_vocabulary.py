"""Cross-entropy in chunks against torch and optax, on one device and on meshes, and what it holds and sends."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from mmfm_jax.losses import vocabulary
from mmfm_jax.losses.mean import mean_where
from mmfm_jax.losses.vocabulary import chunked_cross_entropy
from mmfm_jax.parallel.mesh import AXES

WIDTH, ENTRIES = 6, 20


def draw(seed=0, batch=8, tokens=10):
    rng = np.random.default_rng(seed)
    x = rng.normal(0, 3, (batch, tokens, WIDTH)).astype(np.float32)
    kernel, bias = rng.normal(size=(WIDTH, ENTRIES)).astype(np.float32), rng.normal(size=ENTRIES).astype(np.float32)
    return (x, kernel, bias), rng.integers(0, ENTRIES, (batch, tokens)), rng.random((batch, tokens)) < 0.7


def chunked(parameters, target, valid):
    x, kernel, bias = parameters
    entropy, right = chunked_cross_entropy(x, kernel, bias, target)
    return mean_where(entropy, valid), mean_where(right.astype(jnp.float32), valid)


def whole(parameters, target, valid):
    x, kernel, bias = parameters
    logits = x @ kernel + bias
    entropy = optax.softmax_cross_entropy_with_integer_labels(logits, target)
    return mean_where(entropy, valid), mean_where((logits.argmax(-1) == target).astype(jnp.float32), valid)


def mesh_of(sizes):
    shape = [sizes.get(axis, 1) for axis in AXES]
    return jax.sharding.Mesh(np.array(jax.devices()[: np.prod(shape)]).reshape(shape), AXES)


def compare(got, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6), got, expected)


def test_value_and_gradient_equal_those_of_torch(monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(vocabulary, "LARGEST_LOGITS", 7 * ENTRIES)  # 12 chunks of 7 tokens, the last with 4 of padding
    parameters, target, valid = draw()
    (loss, _), slopes = jax.value_and_grad(chunked, has_aux=True)(parameters, target, valid)
    x, kernel, bias = (torch.tensor(p, requires_grad=True) for p in parameters)
    ignored = torch.tensor(np.where(valid, target, -100)).reshape(-1)
    expected = torch.nn.functional.cross_entropy((x @ kernel + bias).reshape(-1, ENTRIES), ignored)
    expected.backward()
    compare((loss, slopes), (expected.detach().numpy(), tuple(p.grad.numpy() for p in (x, kernel, bias))))


@pytest.mark.parametrize(
    "sizes",
    [{"fsdp": 8}, {"fsdp": 2, "tensor": 4}, {"data": 2, "fsdp": 2, "tensor": 2}, {"sequence": 2, "tensor": 2},
     {"data": 2, "tensor": 3}],
    ids=str,
)  # fmt: skip
def test_no_mesh_changes_loss_accuracy_or_gradient(sizes, monkeypatch):
    monkeypatch.setattr(vocabulary, "LARGEST_LOGITS", 3 * ENTRIES)
    material = draw(1)
    expected = jax.value_and_grad(whole, has_aux=True)(*material)
    with jax.set_mesh(mesh_of(sizes)):
        got = jax.jit(jax.value_and_grad(chunked, has_aux=True))(*material)
    compare(got, expected)


def test_a_thousand_small_gradients_in_bfloat16_are_summed_in_float32(monkeypatch):
    """A sum of equal terms in bfloat16 stops growing at 256 of them."""
    monkeypatch.setattr(vocabulary, "LARGEST_LOGITS", 1)  # a token at a time
    x, kernel, bias = np.ones((2, 500, WIDTH), np.float32), np.zeros((WIDTH, ENTRIES), np.float32), np.zeros(ENTRIES)
    target, valid = np.zeros((2, 500), int), np.ones((2, 500), bool)
    slope = jax.grad(chunked, has_aux=True)((jnp.asarray(x, jnp.bfloat16), kernel, np.float32(bias)), target, valid)[0]
    np.testing.assert_allclose(slope[1][:, 0], 1 / ENTRIES - 1, rtol=2**-7)


def large_case(sizes):
    """Loss and gradient of 8 x 64 tokens of width 16 over 4,096 entries, on a mesh, and the logits it may hold."""
    mesh = mesh_of(sizes)

    def shape(dtype, *shape, split):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(*split)))

    tokens = (("data", "fsdp"), "sequence")
    parameters = (
        shape(jnp.float32, 8, 64, 16, split=tokens),
        shape(jnp.float32, 16, 4096, split=("fsdp", "tensor")),
        shape(jnp.float32, 4096, split=("tensor",)),
    )
    target, valid = shape(jnp.int32, 8, 64, split=tokens), shape(jnp.bool_, 8, 64, split=tokens)
    with jax.set_mesh(mesh):
        return jax.jit(jax.value_and_grad(chunked, has_aux=True)).trace(parameters, target, valid)


def test_the_logits_of_all_tokens_are_never_made(monkeypatch):
    monkeypatch.setattr(vocabulary, "LARGEST_LOGITS", 2**14)
    hlo = large_case({}).lower().compile().as_text() or ""
    sizes = [np.prod([int(n) for n in shape.split(",")]) for shape in re.findall(r"\w+\[([\d,]+)\]", hlo)]
    assert max(sizes) == 16 * 4096  # the kernel


def test_the_kernel_stays_split_over_the_vocabulary_and_its_gradient_is_summed_once(monkeypatch):
    monkeypatch.setattr(vocabulary, "LARGEST_LOGITS", 2**14)
    hlo = large_case({"data": 2, "tensor": 4}).lower().compile().as_text() or ""
    assert "all-gather" not in hlo and "all-to-all" not in hlo and "f32[16,4096]" not in hlo
    sums = [line for line in hlo.splitlines() if re.search(r"all-reduce(-start)?\(", line) and "f32[16,1024]" in line]
    assert len(sums) == 1 and "while" not in sums[0]
