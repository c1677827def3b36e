from itertools import combinations

from hypothesis import given, settings
from hypothesis import strategies as st

from zoo.evaluation.letters import compact_letters


@st.composite
def graphs(draw):
    n = draw(st.integers(1, 9))
    order = draw(st.permutations([f"r{i}" for i in range(n)]))
    pairs = list(combinations(order, 2))
    return order, draw(st.lists(st.sampled_from(pairs), unique=True)) if pairs else []


@given(graphs())
@settings(max_examples=300, deadline=None)
def test_two_share_a_letter_just_where_they_do_not_differ(graph):
    order, different = graph
    letters = compact_letters(order, different)
    assert list(letters) == order
    told_apart = {frozenset(pair) for pair in different}
    for one, two in combinations(order, 2):
        assert bool(set(letters[one]) & set(letters[two])) != (frozenset((one, two)) in told_apart)
    assert letters[order[0]].startswith("a")
    assert all(text and list(text) == sorted(set(text)) for text in letters.values())
    # No letter is left out, none is without use.
    used = sorted(set("".join(letters.values())))
    assert used == [chr(ord("a") + i) for i in range(len(used))]
    for letter in used:
        rest = {name: set(text) - {letter} for name, text in letters.items()}
        kept = all(rest.values()) and all(
            bool(rest[one] & rest[two]) == bool(set(letters[one]) & set(letters[two]))
            for one, two in combinations(order, 2)
        )
        assert not kept, letter


def test_letters_by_hand():
    # Differences between ranks that are far apart give the usual staircase.
    names = [f"T{i}" for i in range(1, 6)]
    assert compact_letters(names, [("T1", "T4"), ("T1", "T5"), ("T2", "T5")]) == {
        "T1": "a",
        "T2": "ab",
        "T3": "abc",
        "T4": "bc",
        "T5": "c",
    }


def test_more_than_fifty_two_letters_stay_single_letters():
    names = [f"r{i}" for i in range(70)]
    letters = compact_letters(names, list(combinations(names, 2)))
    assert len(set(letters.values())) == 70
    assert all(len(text) == 1 and text.isalpha() for text in letters.values())
