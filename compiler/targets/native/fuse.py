"""Fuse the instructions of gated activations in a native program.

    sigmoid(x), x * it  ->  silu(x)
    f(x), it * y        ->  glu f(x, y)

Every buffer of a lowered program is written before it is read, and the fused buffers once.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from llmc.runtime.native.program import Instruction, Program, View


def fuse(program: Program) -> Program:
    """Return the program with fewer instructions and buffers, and the same logits."""
    instructions: dict[int, Instruction] = dict(enumerate(program.instructions))
    reads = Counter(view.buffer for instruction in program.instructions for view in instruction.inputs)
    writers = {instruction.out: number for number, instruction in instructions.items()}
    for number, instruction in list(instructions.items()):
        if (instruction.op, instruction.function) != ("binary", "mul"):
            continue
        for view, other in (instruction.inputs, instruction.inputs[::-1]):
            activation = instructions[writers[view.buffer]]
            if activation.op != "unary" or reads[view.buffer] > 1 or view.width != other.width:
                continue  # another width: a gate of one number
            (x,) = activation.inputs
            if activation.function == "sigmoid" and x == other:
                instructions[number] = replace(activation, function="silu", out=instruction.out)
            else:
                instructions[number] = replace(activation, op="glu", inputs=(x, other), out=instruction.out)
            del instructions[writers[view.buffer]]
            break
    return _drop_buffers(replace(program, instructions=tuple(instructions.values())))


def _drop_buffers(program: Program) -> Program:
    """Return the program without the buffers that no instruction writes."""
    written = sorted({instruction.out for instruction in program.instructions if instruction.out is not None})
    number = {old: new for new, old in enumerate(written)}

    def moved(instruction: Instruction) -> Instruction:
        inputs = tuple(View(number[view.buffer], view.offset, view.width) for view in instruction.inputs)
        return replace(instruction, out=number.get(instruction.out), inputs=inputs)  # type: ignore[arg-type]

    return replace(
        program,
        buffers=tuple(program.buffers[old] for old in written),
        instructions=tuple(moved(instruction) for instruction in program.instructions),
        logits=None if program.logits is None else number[program.logits],
    )
