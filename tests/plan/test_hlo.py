"""The parser against a small program written by hand, every answer worked out by hand."""

import pytest

from mmfm_jax.plan import hlo

PROGRAM = """HloModule jit_f, is_scheduled=true, entry_computation_layout={(f32[4,8]{1,0})->f32[4,8]{1,0}}

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%compared (a: s32[], b: s32[]) -> pred[] {
  %a = s32[] parameter(0)
  %b = s32[] parameter(1)
  ROOT %less = pred[] compare(%a, %b), direction=LT
}

%condition (state: (s32[], f32[4,8])) -> pred[] {
  %state.1 = (s32[]{:T(128)}, f32[4,8]{1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%state.1), index=0
  %limit = s32[] constant(5)
  ROOT %fused = pred[] fusion(%limit, %i), kind=kLoop, calls=%swapped
}

%swapped (limit: s32[], i: s32[]) -> pred[] {
  %limit.1 = s32[] parameter(0)
  %i.1 = s32[] parameter(1)
  ROOT %less.1 = pred[] compare(%i.1, %limit.1), direction=LT
}

%body (state: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %state = (s32[]{:T(128)}, f32[4,8]{1,0:T(8,128)}) parameter(0)
  %i.2 = s32[]{:T(128)} get-tuple-element(%state), index=0
  %x.1 = f32[4,8]{1,0:T(8,128)} get-tuple-element(%state), index=1
  %w = f32[8,8]{1,0:T(8,128)} constant({...})
  %product = f32[4,8]{1,0:T(8,128)} dot(%x.1, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}, @DOT@
  ROOT %next = (s32[]{:T(128)}, f32[4,8]{1,0:T(8,128)}) tuple(%i.2, /*index=1*/%product)
}

ENTRY %main (p: f32[4,8]) -> f32[4,8] {
  %p = f32[4,8]{1,0:T(8,128)} parameter(0)
  %zero = s32[] constant(0)
  %start = (s32[]{:T(128)}, f32[4,8]{1,0:T(8,128)}) tuple(%zero, %p)
  %loop = (s32[]{:T(128)}, f32[4,8]{1,0:T(8,128)}) while(%start), condition=%condition, body=%body
  %kernel = f32[4,8]{1,0:T(8,128)S(1)} custom-call(%p), custom_call_target="tpu_custom_call", @KERNEL@{
"note": "a line break"
}}, metadata={op_name="jit(f)/kernel"}, backend_config={"window_config":{"estimated_cycles":"1234"}}
  ROOT %out = f32[4,8]{1,0:T(8,128)} get-tuple-element(%loop), index=1
}
"""
PROGRAM = PROGRAM.replace("@DOT@", 'metadata={op_name="jit(f)/while/body/dot (x)" stack_frame_id=3}')
PROGRAM = PROGRAM.replace("@KERNEL@", "frontend_attributes={kernel_metadata=")


@pytest.fixture(scope="module")
def module():
    return hlo.parse(PROGRAM)


def test_computations_and_the_entry_are_found_in_order(module):
    assert list(module.computations) == ["add", "compared", "condition", "swapped", "body", "main"]
    assert module.entry == "main"
    names = [instruction.name for instruction in module.computations["main"].instructions]
    assert names == ["p", "zero", "start", "loop", "kernel", "out"]


def test_a_loop_turns_as_often_as_the_constant_its_condition_compares_with(module):
    main = module.computations["main"]
    assert module.trip_count(main, main.by_name["loop"]) == 5
    assert main.by_name["loop"].called == ("body",)


@pytest.mark.parametrize("first, step, turns", [(0, 1, 5), (0, 2, 3), (1, 2, 2), (3, 1, 2)])
def test_a_counter_may_start_and_step_as_it_likes(first, step, turns):
    text = PROGRAM.replace("%zero = s32[] constant(0)", f"%zero = s32[] constant({first})").replace(
        "tuple(%i.2, /*index=1*/%product)", "tuple(%i.3, /*index=1*/%product)"
    )
    counted = f"  %by = s32[] constant({step})\n  %i.3 = s32[] add(%i.2, %by)\n  %w = f32"
    module = hlo.parse(text.replace("  %w = f32", counted))
    main = module.computations["main"]
    assert module.trip_count(main, main.by_name["loop"]) == turns


def test_a_trip_count_that_the_compiler_gives_is_taken():
    line = """  %w = s32[] while(%s), condition=%c, body=%b, backend_config={"known_trip_count":{"n":"7"}}"""
    module = hlo.parse("ENTRY %main (s: s32[]) -> s32[] {\n" + line + "\n}")
    main = module.computations["main"]
    assert module.trip_count(main, main.by_name["w"]) == 7


def test_flops_of_a_loop_are_those_of_its_body_times_its_turns(module):
    main = module.computations["main"]
    assert sum(module.flops(main, instruction) for instruction in main.instructions) == 5 * 2 * 4 * 8 * 8


def test_names_of_operations_and_kernels_survive_brackets_and_line_breaks(module):
    product, kernel = module.computations["body"].by_name["product"], module.computations["main"].by_name["kernel"]
    assert product.op_name == "jit(f)/while/body/dot (x)" and product.operands == ("x.1", "w")
    assert (kernel.target, kernel.op_name, kernel.cycles) == ("tpu_custom_call", "jit(f)/kernel", 1234)
    assert kernel.shapes[0].on_chip and not product.shapes[0].on_chip


@pytest.mark.parametrize(
    "text, size, padded",
    [
        ("f32[4,8]{1,0:T(8,128)}", 128, 8 * 128 * 4),
        ("bf16[3,16,200]{2,1,0:T(8,128)(2,1)}", 3 * 16 * 200 * 2, 3 * 16 * 256 * 2),
        ("bf16[1024,8]{0,1:T(8,128)(2,1)}", 16384, 16384),  # the longer axis lies along the lanes
        ("pred[]", 1, 1),
        ("s4[16]{0}", 8, 8),
    ],
)
def test_an_array_takes_whole_tiles(text, size, padded):
    (shape,) = hlo.shapes(text)
    assert (shape.bytes, shape.padded_bytes) == (size, padded)


@pytest.mark.parametrize(
    "window, shapes, labels, by_hand",
    [
        ("", ("bf16[16,32]", "bf16[32,64]", "bf16[16,64]"), "bf_io->bf", 2 * 16 * 64 * 32),
        # 3 taps over 8 places, the two at the ends outside: 22 products of 5 x 7 channels, batch 2
        ("window={size=3 pad=1_1}, ", ("f32[2,8,5]", "f32[3,5,7]", "f32[2,8,7]"), "b0f_0io->b0f", 2 * 2 * 22 * 5 * 7),
        # a product over a batch of 4, as TPU programs write it: of 4 taps only one meets a real input
        (
            "window={size=4 stride=3 pad=0_0 lhs_dilate=4}, ",
            ("f32[6,4,5]", "f32[4,5,7]", "f32[6,4,7]"),
            "b0f_0io->b0f",
            2 * 4 * 6 * 5 * 7,
        ),
    ],
)
def test_flops_of_a_convolution_are_counted_where_a_tap_meets_an_input(window, shapes, labels, by_hand):
    left, right, out = shapes
    module = hlo.parse(
        f"ENTRY %main (l: {left}, r: {right}) -> {out} {{\n  %l = {left} parameter(0)\n  %r = {right} parameter(1)\n"
        f"  ROOT %c = {out} convolution(%l, %r), {window}dim_labels={labels}\n}}"
    )
    main = module.computations["main"]
    assert module.flops(main, main.by_name["c"]) == by_hand


def test_a_text_without_an_entry_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo.parse("HloModule nothing")
