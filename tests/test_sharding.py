"""Over a mesh of 8 devices: the same numbers, the same answers, and no device holds more than its
share.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from omni2_jax import sharding
from omni2_jax.checkpoint import parameters
from omni2_jax.config import Omni2Config
from omni2_jax.generate.omni2 import Omni2
from omni2_jax.models.model import SPEECH, abstract_state
from omni2_jax.sharding import make_mesh, mesh_of, parse_mesh
from tests.support.compare import assert_wav, tree_equal
from tests.support.conversations import CASES, GREEDY, SHORT, Said, submit
from tests.support.meshes import MESH_PARAMS, MESHES


@pytest.fixture(scope="module", params=MESH_PARAMS)
def sharded(request, checkpoint_dir) -> Omni2:
    """The tiny release without its audio side."""
    return Omni2.load(
        checkpoint_dir, dtype=jnp.float32, decoder=False, mesh=make_mesh(*request.param)
    )


# --- the same numbers


def forward(model: Omni2, rows: int) -> list[np.ndarray]:
    """Features, hidden states and logits of spoken prompts, one after the other longer."""
    rng = np.random.default_rng(0)
    mel = rng.standard_normal((8, 3000, model.config.speech_encoder.mels)).astype(np.float32)[:rows]
    ids = rng.integers(0, 400, (8, 330))[:rows]
    ids[:, 10:310] = SPEECH
    positions = np.where(np.arange(330) < 315 + np.arange(rows)[:, None], np.arange(330), -1)

    def run(params, mel, ids, positions):
        parts = nnx.merge(model.graph, params)
        features = parts.encode_speech(mel)
        hidden, _ = parts.llm(parts.embed_prompt(ids, features), positions)
        return features, hidden, parts.llm.logits(hidden)

    mesh = mesh_of(model.params)
    features, hidden, logits = jax.jit(sharding.within(mesh, run))(
        model.params, mel, ids, positions
    )
    assert hidden.sharding.is_equivalent_to(
        sharding.sharding_of(("batch", None, None), hidden.shape, mesh), 3
    )
    return [features, *(np.where(positions[..., None] >= 0, x, 0) for x in (hidden, logits))]


@pytest.fixture(scope="module")
def forward_alone(text_model):
    return forward(text_model, 8)


def test_forward(sharded, forward_alone):
    """One row for each device along the batch axes."""
    mesh = mesh_of(sharded.params)
    rows = mesh.shape["replica"] * mesh.shape["fsdp"]
    for ours, alone in zip(forward(sharded, rows), forward_alone, strict=True):
        np.testing.assert_allclose(ours, alone[:rows], atol=1e-4, rtol=0)


def test_unrolled_layers_keep_their_places(sharded):
    """Layers in lists, as on a CPU, keep their axes and the shardings that follow from them."""
    state = nnx.state(nnx.merge(sharded.graph, sharded.params))
    places = sharding.of_params(state, mesh_of(sharded.params))
    assert isinstance(sharded.params["llm"]["layers"], dict) and set(
        sharded.params["llm"]["layers"]
    ) == {0, 1}
    for leaf, place in zip(*map(jax.tree.leaves, (sharded.params, places)), strict=True):
        assert leaf.sharding.is_equivalent_to(place, leaf.ndim)


# --- the same answers


@pytest.fixture(scope="module")
def alone(warm_text_engine, text_model):
    return {name: Said.by(submit(warm_text_engine, text_model, name, **SHORT)) for name in CASES}


@pytest.mark.slow
def test_generation(sharded, alone):
    """Text and units of five conversations side by side, in slots that lie on different devices."""
    engine = sharded.engine(GREEDY, 1000, slots=8)
    streams = {name: submit(engine, sharded, name, **SHORT) for name in CASES}
    for name, stream in streams.items():
        assert Said.by(stream) == alone[name]
    compiled = engine.compilations()
    assert (
        Said.by(submit(engine, sharded, "E", **SHORT)) == alone["E"]
        and engine.compilations() == compiled
    )

    mesh, pairs = mesh_of(sharded.params), engine.state.language.llm.pairs[0]
    rows, heads = (
        mesh.shape["replica"] * mesh.shape["fsdp"],
        2 if mesh.shape["tensor"] == 2 else 1,
    )  # 4 or 8 do not go into 2
    assert pairs.sharding.shard_shape(pairs.shape) == (
        2,
        8 // rows,
        2 // heads,
        engine.engine_config.llm_capacity,
        16,
    )


@pytest.fixture(scope="module")
def speaking(checkpoint_dir) -> Omni2:
    """The tiny release, its audio side too, on 2 x 2 devices."""
    mesh = make_mesh(fsdp=2, tensor=2, devices=jax.devices()[:4])
    return Omni2.load(checkpoint_dir, dtype=jnp.float32, mesh=mesh)


@pytest.mark.slow
def test_state_of_the_decoder(speaking):
    """Slots and heads of the flow's cache lie on different devices. A step can be traced."""
    engine = speaking.engine(GREEDY, 1000, slots=2)
    pairs = engine.state.flow.cache.estimator.kv.pairs  # of two branches
    layers, rows, heads, *rest = pairs.shape
    assert pairs.sharding.shard_shape(pairs.shape) == (layers, rows // 2, heads // 2, *rest)
    after, _ = jax.eval_shape(engine.programs.step, engine.params, engine.state)
    shapes = [jax.tree.map(lambda leaf: leaf.shape, state) for state in (after, engine.state)]
    assert shapes[0] == shapes[1]


# The flow's program takes long to compile for a mesh. Its state is tested above, and on meshes the
# engine without it by test_generation.
@pytest.mark.nightly
def test_speech(speaking, engine, model):
    """Samples of two slots on different devices."""
    theirs = speaking.engine(GREEDY, 1000, slots=2)
    streams = [
        [submit(e, m, name, **SHORT) for name in "EA"]
        for e, m in ((engine, model), (theirs, speaking))
    ]
    for ours, other in zip(*streams, strict=True):
        answer, expected = Said.by(other), Said.by(ours)
        assert (answer.text, answer.speech) == (
            expected.text,
            expected.speech,
        ) and answer.samples.size
        assert_wav(answer.samples, expected.samples, 2e-2, 1e-3)


# --- checkpoints


@pytest.fixture(scope="module")
def shapes(checkpoint_dir):
    """The abstract parameters of the tiny release."""
    return abstract_state(Omni2Config.load(checkpoint_dir / "config.json"))[1]


def load(directory, shapes, part, mesh) -> dict:
    return parameters.load_part(
        directory,
        part,
        nnx.to_pure_dict(shapes)[part],
        None,
        sharding.of_params(shapes, mesh)[part],
    )


def test_restored_in_shards(checkpoint_dir, shapes):
    """Saved by one device, restored on 2 x 4: no device is given more of a parameter than its
    share.
    """
    mesh = make_mesh(fsdp=2, tensor=4)
    one = make_mesh(devices=jax.devices()[:1])
    for part in nnx.to_pure_dict(shapes):
        params = load(checkpoint_dir, shapes, part, mesh)
        assert tree_equal(params, load(checkpoint_dir, shapes, part, one))
        for leaf, sharded in zip(
            *map(jax.tree.leaves, (params, sharding.of_params(shapes, mesh)[part])), strict=True
        ):
            assert {shard.data.shape for shard in leaf.addressable_shards} == {
                sharded.shard_shape(leaf.shape)
            }

    def share(leaf: jax.Array) -> float:
        """The part of an array that one device holds."""
        return leaf.addressable_shards[0].data.size / leaf.size

    llm = load(checkpoint_dir, shapes, "llm", mesh)
    assert (
        share(llm["layers"]["mlp"]["up"]["kernel"]) == 1 / 8
        and share(llm["layers"]["attention"]["query"]["kernel"]) == 1 / 8
    )
    assert (
        share(llm["layers"]["attention"]["key"]["kernel"]) == 1 / 2
    )  # two heads, which four devices hold whole


@pytest.mark.parametrize(("saved", "restored"), [("8x1", "2x4"), ("2x4", "1x8"), ("2x2x2", "8x1")])
def test_saved_in_shards(checkpoint_dir, shapes, tmp_path, saved, restored):
    params = load(checkpoint_dir, shapes, "llm", make_mesh(*MESHES[saved]))
    parameters.save_part(tmp_path, "llm", params)
    assert tree_equal(load(tmp_path, shapes, "llm", make_mesh(*MESHES[restored])), params)


# --- what does not fit


def test_axes_that_do_not_divide_are_held_whole():
    mesh = make_mesh(fsdp=2, tensor=4)

    def spec(axes: tuple[str | None, ...], *shape: int) -> tuple:
        return tuple(sharding.partition(axes, shape, mesh))

    assert spec(("embed", "heads", "head"), 28, 64, 8, 16) == (None, "fsdp", "tensor", None)
    assert spec(("embed", "kv_heads", "head"), 64, 2, 16) == ("fsdp", None, None)
    assert spec(("vocabulary", "embed"), 158227, 896) == (None, "fsdp")
    assert spec(("batch", None, "vocabulary"), 3, 7, 8) == (None, None, "tensor")
    assert spec(("hidden", "heads"), 8, 8) == (
        "tensor",
        None,
    )  # an axis of the mesh cuts an array once


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "fsdp=3",
            "mesh 1 x 3 x 1 (replica x fsdp x tensor) does not fit the 8 devices there are;"
            " give sizes that make as many",
        ),
        (
            "replica=2,fsdp=2,tensor=4",
            "mesh 2 x 2 x 4 (replica x fsdp x tensor) does not fit the 8 devices there are",
        ),
        (
            "tensor=3",
            "mesh 1 x -1 x 3 (replica x fsdp x tensor) does not fit the 8 devices there are;"
            " give sizes that divide them",
        ),
        ("tensor=0", "expected positive sizes"),
        (
            "data=8",
            "mesh 'data=8' is not understood, expected sizes of replica, fsdp, tensor,"
            " as in fsdp=2,tensor=4",
        ),
        ("tensor", "mesh 'tensor' is not understood"),
        ("tensor=two", "mesh 'tensor=two' is not understood"),
    ],
)
def test_bad_meshes(text, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        parse_mesh(text)


def test_mesh_as_one_writes_it():
    """What is not named is 1, or for fsdp the rest of the devices."""
    assert parse_mesh("tensor=4").axis_sizes == (1, 2, 4)
    assert parse_mesh("replica=2, fsdp=1,tensor=4").axis_sizes == (2, 1, 4)


def test_mesh_that_does_not_divide_the_model(checkpoint_dir):
    config = Omni2Config.load(checkpoint_dir / "config.json")
    assert (config.llm.width, config.llm.hidden) == (64, 128)
    mesh = make_mesh(fsdp=1, tensor=6, devices=jax.devices()[:6])
    with pytest.raises(
        ValueError, match="tensor=6 does not divide the LLM's hidden size of 128; 1, 2 would"
    ):
        Omni2.load(checkpoint_dir, mesh=mesh)
