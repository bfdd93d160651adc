"""The combinations that the suite runs of a product: any two values meet, and nothing is lost."""

from __future__ import annotations

from itertools import combinations, product

from covering import every_pair

FACTORS = ["abcdef", range(5), [None, True], "xyz"]


def chosen(parameters):
    return [tuple(p.values) for p in parameters if not p.marks]


def test_any_two_values_meet_and_the_rest_is_all_that_is_left():
    parameters = every_pair(*FACTORS)
    assert [tuple(p.values) for p in parameters] == list(product(*FACTORS))
    few = chosen(parameters)
    assert 30 <= len(few) <= 36  # the two largest factors alone need 30; the product has 180
    for (i, one), (j, other) in combinations(enumerate(FACTORS), 2):
        assert {(c[i], c[j]) for c in few} == set(product(one, other))


def test_what_cannot_be_is_left_out_and_the_choice_is_the_same_each_time():
    def where(letter, number, *_):
        return letter != "a" or number == 0

    parameters = every_pair(*FACTORS, where=where)
    assert all(where(*p.values) for p in parameters)
    assert chosen(parameters) == chosen(every_pair(*FACTORS, where=where))
    assert {c[:2] for c in chosen(parameters)} == {p.values[:2] for p in parameters}


def test_of_two_factors_nothing_is_left_out():
    assert len(chosen(every_pair("abc", "xyz"))) == 9
