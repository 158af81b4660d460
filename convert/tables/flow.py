"""CosyVoice2's flow.pt <-> `models.flow.matching.Flow`.

Reference: `CausalMaskedDiffWithXvec` of CosyVoice.
"""

import jax
import numpy as np

from omni2_jax.convert.plan import Rule, Table, Transform, conv, flat, kernel, same

linear = kernel()
# torch Conv1d of size 1 <-> Linear
pointwise = Transform(linear.forward, lambda y: (y.transpose().reshape(*y.shape[::-1], 1),))
# No file holds the noise: the released code draws it when it starts. Here it is drawn once and kept
# in the checkpoint.
noise = Transform(
    lambda shape: np.asarray(jax.random.normal(jax.random.key(0), shape)), lambda y: ()
)


def layer(
    theirs: str, ours: str, transform: Transform = linear, bias: Transform | None = flat
) -> list[Rule]:
    """Weight and, unless `bias` is None, bias of a linear layer or a convolution."""
    rules = [Rule(f"{theirs}.weight", f"{ours}.kernel", transform)]
    return rules if bias is None else [*rules, Rule(f"{theirs}.bias", f"{ours}.bias", bias)]


def norm(theirs: str, ours: str) -> list[Rule]:
    """Scale and bias of a normalisation."""
    return [
        Rule(f"{theirs}.weight", f"{ours}.scale", same),
        Rule(f"{theirs}.bias", f"{ours}.bias", same),
    ]


def conformer(theirs: str, ours: str) -> list[Rule]:
    """The blocks of one of the encoder's two stacks."""
    attention = f"{theirs}.{{i}}.self_attn"
    rules = [
        *layer(f"{attention}.linear_out", f"{ours}.attention.out", kernel(in_dims=2)),
        Rule(f"{attention}.linear_pos.weight", f"{ours}.attention.position", kernel(in_dims=2)),
        Rule(f"{attention}.pos_bias_u", f"{ours}.attention.content_bias"),
        Rule(f"{attention}.pos_bias_v", f"{ours}.attention.position_bias"),
        *norm(f"{theirs}.{{i}}.norm_mha", f"{ours}.attention_norm"),
        *norm(f"{theirs}.{{i}}.norm_ff", f"{ours}.mlp_norm"),
        *layer(f"{theirs}.{{i}}.feed_forward.w_1", f"{ours}.up"),
        *layer(f"{theirs}.{{i}}.feed_forward.w_2", f"{ours}.down"),
    ]
    for short, name in {"q": "query", "k": "key", "v": "value"}.items():
        rules += layer(f"{attention}.linear_{short}", f"{ours}.attention.{name}")
    return rules


def encoder() -> list[Rule]:
    """Units to frames (CosyVoice's UpsampleConformerEncoder)."""
    rules = (
        conformer("encoders", "blocks")
        + conformer("up_encoders", "up_blocks")
        + norm("after_norm", "norm")
    )
    for name in ("embed", "up_embed"):
        rules += layer(f"{name}.out.0", f"{name}.linear") + norm(f"{name}.out.1", f"{name}.norm")
    for theirs, ours in {
        "pre_lookahead_layer.conv1": "look_ahead.ahead",
        "pre_lookahead_layer.conv2": "look_ahead.behind",
        "up_layer.conv": "upsample",
    }.items():
        rules += layer(theirs, ours, conv)
    return rules


def conv_block(theirs: str, ours: str) -> list[Rule]:
    """A causal convolution and the normalisation behind it."""
    return layer(f"{theirs}.block.0", f"{ours}.conv", conv) + norm(
        f"{theirs}.block.2", f"{ours}.norm"
    )


def stage(theirs: str, ours: str, index: str) -> list[Rule]:
    """A stage: `theirs`.0 is the residual block, `theirs`.1.{`index`} are transformer blocks."""
    block = f"{theirs}.1.{{{index}}}"
    rules = conv_block(f"{theirs}.0.block1", f"{ours}.conv1") + conv_block(
        f"{theirs}.0.block2", f"{ours}.conv2"
    )
    rules += layer(f"{theirs}.0.mlp.1", f"{ours}.time") + layer(
        f"{theirs}.0.res_conv", f"{ours}.skip", pointwise
    )
    rules += norm(f"{block}.norm1", f"{ours}.blocks.attention_norm") + norm(
        f"{block}.norm3", f"{ours}.blocks.mlp_norm"
    )
    for short, name in {"q": "query", "k": "key", "v": "value"}.items():
        rules += layer(f"{block}.attn1.to_{short}", f"{ours}.blocks.attention.{name}", bias=None)
    rules += layer(f"{block}.attn1.to_out.0", f"{ours}.blocks.attention.out", kernel(in_dims=2))
    return (
        rules
        + layer(f"{block}.ff.net.0.proj", f"{ours}.blocks.up")
        + layer(f"{block}.ff.net.2", f"{ours}.blocks.down")
    )


def estimator() -> list[Rule]:
    """The velocity's network (CosyVoice's CausalConditionalDecoder)."""
    return [
        *layer("time_mlp.linear_1", "time.linear1"),
        *layer("time_mlp.linear_2", "time.linear2"),
        *stage("down_blocks.0", "down", "i"),
        *layer("down_blocks.0.2", "down_conv", conv),
        *stage("mid_blocks.{i}", "middle", "j"),
        *stage("up_blocks.0", "up", "i"),
        *layer("up_blocks.0.2", "up_conv", conv),
        *conv_block("final_block", "final"),
        *layer("final_proj", "out", pointwise),
    ]


def table() -> Table:
    """The table of a flow of any size."""
    own = [
        Rule("input_embedding.weight", "embed.table"),
        *layer("spk_embed_affine_layer", "speaker"),
        *layer("encoder_proj", "project"),
        Rule((), "noise", noise),
    ]
    return (
        Table(tuple(own))
        + Table(tuple(encoder())).at("encoder.", "encoder.")
        + Table(tuple(estimator())).at("decoder.estimator.", "estimator.")
    )
