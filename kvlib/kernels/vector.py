"""What numba's language lacks: memory at an address, and rows of codes as vectors. LLVM fits them to the machine at hand.

Attention on codes is, page by page, two small matrix products whose right operand is codes: queries [G, D] times keys
[D, 32], weights [G, 32] times values [32, D]. `multiply_rows` is that product: a row of codes is loaded and converted once,
in registers, for all G queries. It needs no compiler but the one inside numba.
"""

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

F32, I8, I16, I32, I64 = ir.FloatType(), ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64)
FLOAT32, FLOAT16, BFLOAT16, INT8 = 32, 17, 16, -8  # how a row is stored; 8, 4 and 2 are unsigned codes of so many bits
LINE_BYTES = 64  # of a cache line
BITS = {FLOAT32: 32, FLOAT16: 16, BFLOAT16: 16, INT8: 8, 8: 8, 4: 4, 2: 2}


def vector(item: ir.Type, n: int) -> ir.VectorType:
    return ir.VectorType(item, n)


def at(builder, address, kind: ir.Type, offset=None, align: int = 1):
    """The value of type `kind` at an address, `offset` bytes on."""
    value = builder.load(builder.inttoptr(builder.add(address, offset) if offset else address, kind.as_pointer()))
    value.align = align
    return value


def put(builder, value, address) -> None:
    """Store a value at an address."""
    builder.store(value, builder.inttoptr(address, value.type.as_pointer())).align = 4


def everywhere(builder, number, n: int):
    """A vector that holds one number n times."""
    kind = vector(number.type, n)
    first = builder.insert_element(ir.Constant(kind, ir.Undefined), number, I32(0))
    return builder.shuffle_vector(first, first, ir.Constant(vector(I32, n), None))


def ask_for(builder, address, offset: int) -> None:
    """Prefetch the cache line `offset` bytes behind an address; any address will do."""
    pointer = I8.as_pointer()
    shape = ir.FunctionType(ir.VoidType(), [pointer, I32, I32, I32])
    ask = cgutils.get_or_insert_function(builder.module, shape, "llvm.prefetch.p0")
    builder.call(ask, [builder.inttoptr(builder.add(address, I64(offset)), pointer), I32(0), I32(3), I32(1)])


def fma(builder, a, b, c):
    """a * b + c, rounded once."""
    kind = a.type
    name = f"llvm.fma.v{kind.count}f32"
    return builder.call(cgutils.get_or_insert_function(builder.module, ir.FunctionType(kind, [kind] * 3), name), [a, b, c])


def scaled(builder, number: int, factor):
    """A constant times an i64."""
    return builder.mul(I64(number), factor)


def numbers(builder, address, stored: int, n: int):
    """A row of n numbers as floats. Codes of under 8 bits come times the `lane_factors` that undo it."""
    wide = vector(F32, n)
    if stored == FLOAT32:
        return at(builder, address, wide)
    if stored == FLOAT16:
        return builder.fpext(at(builder, address, vector(ir.HalfType(), n)), wide)
    if stored == BFLOAT16:
        upper = builder.zext(at(builder, address, vector(I16, n)), vector(I32, n))
        return builder.bitcast(builder.shl(upper, ir.Constant(vector(I32, n), [16] * n)), wide)
    if stored == INT8:
        return builder.sitofp(at(builder, address, vector(I8, n)), wide)
    n_bytes = n * stored // 8
    packed = at(builder, address, vector(I8, n_bytes))
    planes = builder.shuffle_vector(packed, packed, ir.Constant(vector(I32, n), [i % n_bytes for i in range(n)]))
    masks = [(2**stored - 1) << stored * (i // n_bytes) for i in range(n)]
    return builder.uitofp(builder.and_(planes, ir.Constant(vector(I8, n), masks)), wide)


def lane_factors(stored: int, n: int) -> list[float]:
    """What brings codes that were masked but not shifted back to their size: powers of two, so nothing is rounded."""
    return [2.0 ** -(stored * (i // (n * stored // 8))) if stored in (4, 2) else 1.0 for i in range(n)]


@intrinsic(prefer_literal=True)
def multiply_rows(typing, left, left_stride, rows, n_rows, ahead, out, out_stride, bias, group, stored, width, add):
    """out[g, :width] = bias[g] + sum over i < n_rows of left[g, i] * rows[i, :width], for g < group; with `add`, += instead.

    `rows` lie one behind the other, stored as `stored` says; all else is fp32. `left`, `rows`, `out` and `bias` are
    addresses, strides count floats. The last four are known when the code is compiled. Meanwhile as many bytes at `ahead` are
    fetched: the next pages lie anywhere, so the machine cannot guess them.
    """
    group_size, kind, lanes, adds = (x.literal_value for x in (group, stored, width, add))
    row_bytes = lanes * BITS[kind] // 8
    n_sums = max(1, 4 // group_size)  # so many rows at once, each into a sum of its own: a sum has to wait for itself

    def emit(context, builder, signature, arguments):
        left, left_stride, rows, n_rows, ahead, out, out_stride, bias = arguments[:8]
        wide = vector(F32, lanes)
        none, factors = ir.Constant(wide, [0.0] * lanes), ir.Constant(wide, lane_factors(kind, lanes))
        sums = [[cgutils.alloca_once_value(builder, none) for _ in range(group_size)] for _ in range(n_sums)]

        def add_row(i, target) -> None:
            row = numbers(builder, builder.add(rows, scaled(builder, row_bytes, i)), kind, lanes)
            for g in range(group_size):
                offset = scaled(builder, 4, builder.add(scaled(builder, g, left_stride), i))
                factor = everywhere(builder, at(builder, left, F32, offset, 4), lanes)
                builder.store(fma(builder, factor, row, builder.load(target[g])), target[g])

        rounds = builder.sdiv(n_rows, I64(n_sums))
        with cgutils.for_range(builder, rounds, intp=I64) as loop:
            first = scaled(builder, n_sums, loop.index)
            for line in range(0, n_sums * row_bytes, LINE_BYTES):
                ask_for(builder, builder.add(ahead, scaled(builder, row_bytes, first)), line)
            for u in range(n_sums):
                add_row(builder.add(first, I64(u)), sums[u])
        if n_sums > 1:
            done = scaled(builder, n_sums, rounds)
            with cgutils.for_range(builder, builder.sub(n_rows, done), intp=I64) as loop:
                add_row(builder.add(done, loop.index), sums[0])
        for g in range(group_size):
            total = builder.load(sums[0][g])
            for u in range(1, n_sums):
                total = builder.fadd(total, builder.load(sums[u][g]))
            before = everywhere(builder, at(builder, bias, F32, I64(4 * g), 4), lanes)
            target = builder.add(out, scaled(builder, 4 * g, out_stride))
            if adds:
                before = builder.fadd(before, at(builder, target, wide, align=4))
            put(builder, fma(builder, total, factors, before), target)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 8, group, stored, width, add), emit


@intrinsic(prefer_literal=True)
def fold_scales(typing, left, left_stride, scale, zero, n, out, out_stride, sums, group, stored, width):
    """out[g, :n] = left[g, :n] * scale[:n] and, unless `stored` is 0, sums[g] = left[g, :n] . zero[:n], for g < group.

    So zero + scale * code is multiplied as code alone. Addresses as in `multiply_rows`; `scale` is bf16, `zero` stored as
    `stored` says; n is a multiple of `width`.
    """
    group_size, kind, lanes = group.literal_value, stored.literal_value, width.literal_value

    def emit(context, builder, signature, arguments):
        left, left_stride, scale, zero, n, out, out_stride, sums = arguments[:8]
        wide = vector(F32, lanes)
        totals = [cgutils.alloca_once_value(builder, ir.Constant(wide, [0.0] * lanes)) for _ in range(group_size)]
        with cgutils.for_range(builder, builder.sdiv(n, I64(lanes)), intp=I64) as loop:
            i = scaled(builder, lanes, loop.index)
            factors = numbers(builder, builder.add(scale, scaled(builder, 2, i)), BFLOAT16, lanes)
            zeros = numbers(builder, builder.add(zero, scaled(builder, BITS[kind] // 8, i)), kind, lanes) if kind else None
            for g in range(group_size):
                row = at(builder, left, wide, scaled(builder, 4, builder.add(scaled(builder, g, left_stride), i)), 4)
                target = scaled(builder, 4, builder.add(scaled(builder, g, out_stride), i))
                put(builder, builder.fmul(row, factors), builder.add(out, target))
                if kind:
                    builder.store(fma(builder, row, zeros, builder.load(totals[g])), totals[g])
        for g in range(group_size if kind else 0):
            shape, name = ir.FunctionType(F32, [F32, wide]), f"llvm.vector.reduce.fadd.v{lanes}f32"
            add_up = cgutils.get_or_insert_function(builder.module, shape, name)
            total = builder.call(add_up, [F32(0.0), builder.load(totals[g])], fastmath=("reassoc",))
            put(builder, total, builder.add(sums, I64(4 * g)))
        return context.get_dummy_value()

    return types.void(*[types.int64] * 8, group, stored, width), emit


@intrinsic
def largest(typing, address, n):
    """The largest of n floats at an address, n a multiple of 32. (A loop would compare one by one, for the sake of NaN.)"""

    def emit(context, builder, signature, arguments):
        wide = vector(F32, 32)
        best = cgutils.alloca_once_value(builder, ir.Constant(wide, [float("-inf")] * 32))
        with cgutils.for_range(builder, builder.sdiv(arguments[1], I64(32)), intp=I64) as loop:
            row, so_far = at(builder, arguments[0], wide, scaled(builder, 4 * 32, loop.index), 4), builder.load(best)
            builder.store(builder.select(builder.fcmp_ordered(">", row, so_far), row, so_far), best)
        shape = ir.FunctionType(F32, [wide])
        reduce = cgutils.get_or_insert_function(builder.module, shape, "llvm.vector.reduce.fmax.v32f32")
        return builder.call(reduce, [builder.load(best)], fastmath=("nnan",))

    return types.float32(types.int64, types.int64), emit


@intrinsic
def prefetch(typing, address, n_bytes):
    """Ask for memory that will be read soon."""

    def emit(context, builder, signature, arguments):
        address, n_bytes = arguments
        n_lines = builder.sdiv(builder.add(n_bytes, I64(LINE_BYTES - 1)), I64(LINE_BYTES))
        with cgutils.for_range(builder, n_lines, intp=I64) as loop:
            ask_for(builder, builder.add(address, scaled(builder, LINE_BYTES, loop.index)), 0)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), emit


@intrinsic
def float_from_bits(typing, bits):
    """The float32 whose bits an int32 holds."""
    return types.float32(types.int32), lambda context, builder, signature, arguments: builder.bitcast(arguments[0], F32)
