"""Which prompt gets how many tokens of a step."""

from __future__ import annotations

from qnext.engine.llama.scheduler import ChunkPolicy, Waiting


def test_a_prompt_alone_gets_whole_ubatches_and_stops_where_it_has_to() -> None:
    policy = ChunkPolicy(512, stall_s=1.0)
    assert policy.share([Waiting(3, 2000, 2000)], running=0) == [(3, 512)]
    assert policy.share([Waiting(3, 976, 100)], running=0) == [(3, 100)]
    assert policy.share([], running=4) == []


def test_short_prompts_share_a_chunk() -> None:
    policy = ChunkPolicy(512, stall_s=1.0)
    waiting = [Waiting(index, 250, 250) for index in range(4)]
    assert policy.share(waiting, running=0) == [(0, 250), (1, 250)]


def test_every_other_chunk_goes_to_the_prompt_that_is_nearest_to_its_end() -> None:
    policy = ChunkPolicy(512, stall_s=1.0)
    left = {0: 10_000, 1: 1500, 2: 1600}
    ended: list[int] = []
    for _ in range(30):
        shares = policy.share([Waiting(key, size, size) for key, size in left.items()], running=0)
        assert shares and sum(size for _, size in shares) <= 512
        for key, size in shares:
            left[key] -= size
            if not left[key]:
                del left[key]
                ended.append(key)
        if not left:
            break
    assert ended == [1, 2, 0]


def test_a_chunk_that_would_hold_up_others_is_made_smaller_but_never_tiny() -> None:
    policy = ChunkPolicy(512, stall_s=1.0)
    policy.learn(512, 2.0)
    assert policy.chunk_size(running=1) == 256 - 1
    assert policy.chunk_size(running=0) == 512, "nobody waits"
    for _ in range(8):
        policy.learn(512, 100.0)
    assert policy.chunk_size(running=2) == 64 - 2
    policy.learn(8, 10.0)
    assert policy.chunk_size(running=2) == 64 - 2, "a few tokens say nothing of the speed"
    for _ in range(8):
        policy.learn(64, 0.01)
    assert policy.chunk_size(running=2) == 510
