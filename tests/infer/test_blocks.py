"""How many blocks of the cache are used: a block takes memory from its first use on."""

from sparing.infer.scheduler import BLOCK, BlockManager, block_key


def text(number: int, blocks: int = 3) -> list[int]:
    return [number] * (blocks * BLOCK + 1)


def compute(manager: BlockManager, tokens: list[int]) -> tuple[int, list[int]]:
    """A text from its admission to its end -> (blocks found in the cache, all its blocks)."""
    found, key = manager.match(tokens)
    taken = manager.take(-(-len(tokens) // BLOCK) - len(found))
    blocks = found + taken
    for i in range(len(found), len(tokens) // BLOCK):
        key = block_key(key, tokens[i * BLOCK : (i + 1) * BLOCK])
        manager.seal(blocks[i], key)
    manager.release(blocks)
    return len(found), blocks


def test_texts_that_share_nothing_use_no_more_blocks_than_one_of_them():
    manager = BlockManager(100)
    used = {block for number in range(20) for block in compute(manager, text(number))[1]}
    assert used == {0, 1, 2, 3}
    assert (manager.free, manager.cached, manager.evicted) == (100, 3, 19 * 3)


def test_the_last_text_is_found_again():
    manager = BlockManager(100)
    compute(manager, text(1))
    assert compute(manager, text(1, 5))[0] == 3


def test_more_blocks_are_used_where_what_was_evicted_is_asked_for():
    manager, found = BlockManager(100), []
    for _ in range(5):
        found += [compute(manager, text(number))[0] for number in range(3)]
    assert found[:3] == [0, 0, 0] and found[-6:] == [3] * 6
    assert manager.cached == 3 * 3


def test_all_blocks_are_used_for_texts_at_the_same_time():
    manager = BlockManager(8)
    held = [manager.take(2) for _ in range(4)]
    assert sorted(block for blocks in held for block in blocks) == list(range(8)) and manager.free == 0
    assert manager.take(1) is None
    manager.release(held[1])
    assert manager.free == 2 and sorted(manager.take(2)) == sorted(held[1])
