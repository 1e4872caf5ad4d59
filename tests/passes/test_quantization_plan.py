"""Plans: who is quantized, who is not and why, what it weighs; and the recipe's own exclusions."""

from typing import Any

import pytest

from llmc.cli.plan_table import plan_lines
from llmc.compiler.checkpoint import recipe
from llmc.passes.quantize.formats import FORMATS, Format, systematic_format
from llmc.passes.quantize.plan import Module, QuantPlan, fused_groups, make_plan
from llmc.runtime.errors import BuildError, RequestError

LAYER = {
    "self_attn.q_proj": (256, 256),
    "self_attn.k_proj": (128, 256),
    "self_attn.v_proj": (128, 256),
    "self_attn.o_proj": (256, 256),
    "mlp.gate_proj": (704, 256),
    "mlp.up_proj": (704, 256),
    "mlp.down_proj": (256, 704),
}
MATRICES = {
    "model.embed_tokens": (1000, 256),
    **{f"model.layers.{layer}.{name}": shape for layer in range(12) for name, shape in LAYER.items()},
    "lm_head": (1000, 256),
}


def reasons(plan: QuantPlan) -> dict[str, str]:
    return {module.name: module.reason for module in plan.modules if module.format is None}


def test_layers_are_quantized_and_the_ends_are_not() -> None:
    plan = make_plan(MATRICES, "int4")
    assert reasons(plan) == {"model.embed_tokens": "default: *.embed_tokens", "lm_head": "default: lm_head"}
    assert list(plan.quantized()) == [name for name in MATRICES if ".layers." in name]
    assert {module.format for module in plan.quantized().values()} == {FORMATS["int4"]}
    assert [module.name for module in plan.modules] == list(MATRICES)


def test_groups_are_what_is_multiplied_as_one() -> None:
    groups = make_plan(MATRICES, "nvfp4").groups()
    assert len(groups) == 12 * 4
    names = [[module.name.rpartition(".")[2] for module in group] for group in groups[:4]]
    assert names == [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]


def test_groups_do_not_depend_on_the_order_of_a_checkpoint() -> None:
    in_order = fused_groups(MATRICES)
    assert sorted(fused_groups(dict(sorted(MATRICES.items())))) == sorted(in_order)


def test_groups_need_one_input() -> None:
    matrices = {"a.q_proj": (8, 32), "a.k_proj": (8, 64), "a.v_proj": (8, 64), "q_proj": (8, 32)}
    assert fused_groups(matrices) == []
    assert fused_groups({"gate_proj": (8, 32), "up_proj": (8, 32)}) == [("gate_proj", "up_proj")]


def test_groups_from_the_graph() -> None:
    matrices = {"a.x": (8, 32), "a.y": (8, 32), "a.z": (32, 8)}
    plan = make_plan(matrices, "int8", ["a.y"], groups=[("a.x", "a.y")])
    assert reasons(plan) == {"a.x": "fused with y: --exclude a.y", "a.y": "--exclude a.y"}
    for wrong in ([("a.x", "b")], [("a.x", "a.z")], [("a.x", "a.y"), ("a.y",), ("a.y", "a.x")]):
        with pytest.raises(ValueError, match="unknown, in two groups, or has another input"):
            make_plan(matrices, "int8", groups=wrong)


def test_excluding_one_of_a_group_excludes_all() -> None:
    plan = make_plan(MATRICES, "fp8", exclude=["*.3.*.k_proj"], recipe_exclude=["model.layers.0.*"])
    why = reasons(plan)
    assert why["model.layers.3.self_attn.k_proj"] == "--exclude *.3.*.k_proj"
    assert why["model.layers.3.self_attn.q_proj"] == "fused with k_proj: --exclude *.3.*.k_proj"
    assert why["model.layers.3.self_attn.v_proj"] == "fused with k_proj: --exclude *.3.*.k_proj"
    assert why["model.layers.0.mlp.down_proj"] == "recipe: model.layers.0.*"
    assert len(why) == 2 + 3 + 7


def test_shapes_that_the_format_cannot_take() -> None:
    why = reasons(make_plan(MATRICES, "int4-block128"))
    assert why["model.layers.7.mlp.down_proj"] == "704 columns are not a multiple of the block of 128"
    assert len(why) == 2 + 12


def test_pattern_is_of_the_whole_name() -> None:
    with pytest.raises(RequestError, match=r"--exclude down_proj matches no matrix") as caught:
        make_plan(MATRICES, "int8", ["down_proj"])
    assert "did you mean '*.down_proj'?" in caught.value.hint


@pytest.mark.parametrize(
    ("pattern", "near"),
    [
        ("model.layers.5.mlp.dwn_proj", "model.layers.*.mlp.down_proj"),
        ("*.gate_prj", "*.gate_proj"),
        ("lmhead", "lm_head"),
        ("model.layers.3", "model.layers.3.*"),
        ("zzzzzz", "*.down_proj"),
    ],
)
def test_pattern_that_matches_nothing_names_the_nearest(pattern: str, near: str) -> None:
    with pytest.raises(RequestError) as caught:
        make_plan(MATRICES, "int8", [pattern])
    assert near in caught.value.hint


def test_recipe_that_matches_nothing_is_our_mistake() -> None:
    with pytest.raises(BuildError, match=r"the recipe excludes \*\.router"):
        make_plan(MATRICES, "int8", recipe_exclude=["*.router"])


def test_nothing_left() -> None:
    with pytest.raises(RequestError, match=r"int8 quantizes nothing .* --exclude \*"):
        make_plan({"a.q_proj": (8, 8)}, "int8", ["*"])
    with pytest.raises(RequestError, match="no matrices"):
        make_plan({}, "int8")


def test_unknown_format() -> None:
    with pytest.raises(RequestError, match="'q4_0'"):
        make_plan(MATRICES, "q4_0")


@pytest.mark.parametrize("name", FORMATS)
def test_bytes_are_those_of_the_arrays(name: str) -> None:
    plan = make_plan(MATRICES, name, other_params=1000)
    params = sum(out * width for out, width in MATRICES.values()) + 1000
    quantized = plan.quantized()
    kept = sum(out * width for n, (out, width) in MATRICES.items() if n not in quantized) + 1000
    fused = [(sum(module.shape[0] for module in group), group[0].shape[1]) for group in plan.groups()]
    expected = 2 * kept + sum(FORMATS[name].nbytes(shape) for shape in fused)
    assert (plan.params, plan.bytes_before, plan.bytes_after) == (params, 2 * params, expected)
    assert plan.bits_per_parameter == 8 * expected / params


def test_scales_of_the_target_count() -> None:
    wide, narrow = make_plan(MATRICES, "int4", scales="F32"), make_plan(MATRICES, "int4", scales="BF16")
    assert wide.bytes_after - narrow.bytes_after == 12 * (3 * 704 * 256 + 768 * 256) // 32 * 2
    assert make_plan(MATRICES, "nvfp4", scales="BF16").format == FORMATS["nvfp4"]


def test_frozen_and_equal() -> None:
    plan: Any = make_plan(MATRICES, "nvfp4", ["*.o_proj"])
    assert plan == make_plan(dict(MATRICES), "nvfp4", ("*.o_proj",))
    assert hash(plan) == hash(make_plan(MATRICES, "nvfp4", ["*.o_proj"]))
    with pytest.raises(AttributeError):
        plan.stored_bits = 8


def test_table() -> None:
    plan = make_plan(MATRICES, "int4", ["*.[257].*.o_proj", "*.6.self_attn.o_proj"], other_params=6400)
    assert "\n".join(plan_lines(plan)) == TABLE.strip("\n")


TABLE = """
modules                                     out x in    bits  format, or why not
model.embed_tokens                          1000 x 256  16    default: *.embed_tokens
model.layers.0-11.self_attn.q_proj          256 x 256   4.5   int4
model.layers.0-11.self_attn.k_proj          128 x 256   4.5   int4
model.layers.0-11.self_attn.v_proj          128 x 256   4.5   int4
model.layers.0-1,3-4,8-11.self_attn.o_proj  256 x 256   4.5   int4
model.layers.0-11.mlp.gate_proj             704 x 256   4.5   int4
model.layers.0-11.mlp.up_proj               704 x 256   4.5   int4
model.layers.0-11.mlp.down_proj             256 x 704   4.5   int4
model.layers.2,5,7.self_attn.o_proj         256 x 256   16    --exclude *.[257].*.o_proj
model.layers.6.self_attn.o_proj             256 x 256   16    --exclude *.6.self_attn.o_proj
lm_head                                     1000 x 256  16    default: lm_head
80 of 86 matrices in int4: 5.46 bits per parameter, 6.1 MiB (before: 16, 17.9 MiB)
"""


def test_recipe_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    family = tmp_path / "some_moe"
    family.mkdir()
    (family / "recipe.toml").write_text('[matches]\n[quantize]\nexclude = ["*.router", "model.layers.0.*"]\n')
    monkeypatch.setattr(recipe.resources, "files", lambda package: tmp_path)
    assert recipe.load("some_moe").quantize_exclude == ("*.router", "model.layers.0.*")


def test_recipes_of_the_zoo_exclude_routers_only() -> None:
    patterns = {one for name in recipe.known_families() for one in recipe.load(name).quantize_exclude}
    assert patterns == {"*.mlp.gate", "*.router", "*.feed_forward.router", "*.shared_expert_gate"}


def integer(element: str, block: int, activations: str = "") -> Format:
    return systematic_format(element, block, "F16", activations)


@pytest.mark.parametrize(
    ("formats", "group"),
    [
        ([FORMATS["int8"]], 128),
        ([FORMATS["int4"]], 32),
        ([FORMATS["int4-block128"]], 128),
        ([integer("int4", 64)], 64),
        ([integer("int8", 64)], 64),
        ([integer("int4", 0)], 128),  # per channel
        ([integer("int4", 256), FORMATS["int8"]], 128),
        ([FORMATS["int4-block128"], integer("int8", 96), FORMATS["fp8"]], 32),
        ([integer("int8", 24)], 0),  # 8 would be less than a vector
        ([FORMATS["int8-smoothquant"]], 0),
        ([FORMATS["nvfp4"], FORMATS["fp8"]], 0),
        ([None], 0),
    ],
)
def test_groups_of_activations_divide_every_block(formats: list[Format | None], group: int) -> None:
    modules = [Module(f"m{i}", (768, 768), fmt, "", (f"m{i}",)) for i, fmt in enumerate(formats)]
    plan = QuantPlan(formats[0] or FORMATS["int8"], tuple(modules), 16, 0)
    assert plan.activation_group == group
    assert plan.record()["activation_group"] == group
