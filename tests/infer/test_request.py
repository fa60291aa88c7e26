from sparing.infer.request import TextStream


def stream(tokenizer, text, stop=()):
    pieces, stopped = [], False
    feed = TextStream(tokenizer, stop)
    ids = tokenizer.encode(text)
    for token in ids:
        piece, stopped = feed.push(token)
        pieces.append(piece)
        if stopped:
            break
    last = None if stopped else feed.finish()
    return ids, [p for p in (*pieces, last) if p], stopped


def test_characters_come_whole_and_all_tokens_once(tokenizer):
    text = "naïve 日本語 🦆🦆 end"  # bytes of these are single tokens to this tokenizer
    ids, pieces, _ = stream(tokenizer, text)
    assert "".join(p.text for p in pieces) == text
    assert all("\ufffd" not in p.text for p in pieces)
    assert [token for p in pieces for token in p.tokens] == ids and len(ids) > len(text)


def test_broken_bytes_are_not_waited_for(tokenizer):
    feed = TextStream(tokenizer)
    broken = tokenizer.encode("日")[0]
    shown = [feed.push(broken)[0] for _ in range(30)]
    assert sum(len(p.tokens) for p in shown if p) >= 22


def test_stop_strings_across_tokens(tokenizer):
    _, pieces, stopped = stream(tokenizer, "one two three four five", ("three fo",))
    assert stopped and "".join(p.text for p in pieces) == "one two "
    _, pieces, stopped = stream(tokenizer, "one two three four five", ("three fx", "twx", "five!"))
    assert not stopped and "".join(p.text for p in pieces) == "one two three four five"
    _, pieces, stopped = stream(tokenizer, "aaab", ("aab", "b"))
    assert stopped and "".join(p.text for p in pieces) == "a", "the earliest stop counts"
