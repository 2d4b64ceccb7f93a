"""Defects that the schedules of test_exchange.py must show: each takes a MonkeyPatch and breaks the kernels.

They replace jitted functions, which the interpreter looks up by name in the module that calls them. The programs of
a launch are threads of their own, so what a mutant counts per program is thread-local.
"""

import threading

from persistrnn.kernels import launch
from persistrnn.kernels.device import exchange, exchanged_product, product, scan

# ---- the exchange of h or of the gate gradients -------------------------------------------------------------------


def wait_removed(monkeypatch):
    monkeypatch.setattr(exchanged_product, "wait", lambda counter, target, spin_limit, *_: spin_limit)


def counter_off_by_one(monkeypatch):
    def wait(counter, target, *others):
        return exchange.wait(counter, target - 1, *others)

    monkeypatch.setattr(exchanged_product, "wait", wait)


def store_after_release(monkeypatch):
    """Program 1 tells of its first step before it stores it, and stores it once another program has read its place."""
    program, read = threading.local(), threading.Event()

    def put(*arguments):
        if scan.tl.program_id(0).handle.data.item() == 1 and not program.__dict__.get("arrived"):
            program.__dict__.setdefault("stores", []).append(arguments)
        else:
            exchange.put(*arguments)

    def arrive(counter, how):
        stores = program.__dict__.pop("stores", ())
        if stores:
            program.arrived = True
            read.clear()
        exchange.arrive(counter, how)
        if stores:
            assert read.wait(60)  # nobody gets there before the arrival, whatever the machine's load
        for arguments in stores:
            exchange.put(*arguments)

    def wait(counter, target, *others):
        program.awaited = getattr(target, "handle", None) is not None and target.handle.data.item() > 0
        return exchange.wait(counter, target, *others)

    def get(*arguments):
        found = exchange.get(*arguments)
        if program.awaited:
            read.set()
        return found

    for module, mutant in ((scan, put), (scan, arrive), (exchanged_product, wait), (product, get)):
        monkeypatch.setattr(module, mutant.__name__, mutant)


def flag_reset_forgotten(monkeypatch):
    def leave(buffer, part, how):
        buffer.fill_(0.25)

    monkeypatch.setattr(launch, "flag", leave)


def counted_for_the_wrong_part(monkeypatch):
    """Two dimensions: a program counts for the part of K that it reads, and not for the one that its units are in."""
    publish = scan.publish

    def published(pointer, offsets, mask, stride, tiles, counter, tiling, how):
        program = scan.tl.program_id(0)
        shift = program % tiling.k_parts - program // tiling.unit_groups
        publish(pointer, offsets, mask, stride, tiles, counter + shift * how.stride, tiling, how)

    monkeypatch.setattr(scan, "publish", published)


# ---- the exchange of partial products -----------------------------------------------------------------------------


def sum_without_wait(monkeypatch):
    monkeypatch.setattr(exchanged_product, "await_count", lambda counter, target, spin_limit, *_: spin_limit)


def sum_off_by_one(monkeypatch):
    def await_count(counter, target, *others):
        return exchange.await_count(counter, target - 1, *others)

    monkeypatch.setattr(exchanged_product, "await_count", await_count)


def _sum_without_parity(monkeypatch, backward):
    """The partial products of two steps in a row go to the same place."""

    add = exchanged_product.add_parts

    def add_parts(tiles, sums, k_part, counter, target, spin_limit, error, tiling, how):
        if (len(tiles) == 1) == backward:
            parity = (target // tiling.k_parts - 1) % 2
            sums = sums - parity * (tiling.slices * len(tiles) * tiling.units_formed * tiling.batch_tile)
        return add(tiles, sums, k_part, counter, target, spin_limit, error, tiling, how)

    monkeypatch.setattr(exchanged_product, "add_parts", add_parts)


def sum_without_parity_in_the_forward(monkeypatch):
    _sum_without_parity(monkeypatch, False)


def sum_without_parity_in_the_backward(monkeypatch):
    _sum_without_parity(monkeypatch, True)


def sum_without_one_block(monkeypatch):
    reads = threading.local()

    add = exchanged_product.add_parts

    def add_parts(tiles, sums, k_part, counter, target, spin_limit, error, tiling, how):
        reads.count, reads.last = 0, tiling.k_parts
        return add(tiles, sums, k_part, counter, target, spin_limit, error, tiling, how)

    def read(pointers):
        reads.count += 1
        return exchange.read(pointers) * (reads.count % reads.last != 0)

    monkeypatch.setattr(exchanged_product, "add_parts", add_parts)
    monkeypatch.setattr(exchanged_product, "read", read)


# ---- streaming, several batch tiles -------------------------------------------------------------------------------


def prefetch_not_advanced(monkeypatch):
    """The tile that is loaded ahead is the one in use."""
    original = product.streamed

    def streamed(matrix, i, tiling):
        return original(matrix, (i - 1) % tiling.streamed, tiling)

    def first_streamed(matrix, tiling):
        return original(matrix, 0, tiling) if tiling.streamed else ()

    monkeypatch.setattr(product, "streamed", streamed)
    monkeypatch.setattr(scan, "first_streamed", first_streamed)


def batch_tiles_share_a_counter(monkeypatch):
    """All batch tiles of a program use the first one's counters."""
    program = threading.local()
    batch_tile, publish = scan.batch_tile, scan.publish

    def first(name, counter, how):
        turn = program.__dict__.get(name, 0)
        setattr(program, name, turn + 1)
        return counter - turn % program.tiling.subtiles * program.tiling.counters_per_tile * how.stride

    def tile(who, j, B, tiling):
        program.tiling = tiling
        return batch_tile(who, j, B, tiling)

    def published(pointer, offsets, mask, stride, tiles, counter, tiling, how):
        publish(pointer, offsets, mask, stride, tiles, first("publish", counter, how), tiling, how)

    def wait(counter, target, spin_limit, error, how):
        return exchange.wait(first("wait", counter, how), target, spin_limit, error, how)

    monkeypatch.setattr(scan, "batch_tile", tile)
    monkeypatch.setattr(scan, "publish", published)
    monkeypatch.setattr(exchanged_product, "wait", wait)


def batch_tiles_share_partial_products(monkeypatch):
    """All batch tiles of a program put their partial products at the first one's place."""
    program = threading.local()

    add = exchanged_product.add_parts

    def add_parts(tiles, sums, k_part, counter, target, spin_limit, error, tiling, how):
        turn = program.__dict__.get("turn", 0)
        program.turn = turn + 1
        size = 2 * tiling.slices * len(tiles) * tiling.units_formed * tiling.batch_tile
        sums = sums - turn % tiling.subtiles * size
        return add(tiles, sums, k_part, counter, target, spin_limit, error, tiling, how)

    monkeypatch.setattr(exchanged_product, "add_parts", add_parts)
