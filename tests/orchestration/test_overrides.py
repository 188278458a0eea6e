"""Overrides of params.yaml: any value, comments kept, nothing else changed."""

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from ado_tasks.errors import ConfigError
from ado_tasks.orchestration.overrides import apply

TEXT = "# top\nseed: 0  # of all\nmodel:\n  widths: [1, 2]\n  deep:\n    lit: true\n"
WORDS = st.text("abc: #-'\n", max_size=8) | st.sampled_from(
    ["on", "no", "null", "~", "1e-3", "0x10", "1:30", "2026-01-01"]
)
PLAIN = st.none() | st.booleans() | st.integers(-9, 9) | st.floats(1e-9, 1e9) | WORDS
KEYS = st.text("xyz", min_size=1, max_size=3)
VALUES = st.recursive(PLAIN, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3))


@given(VALUES, st.sampled_from(["seed", "model.widths", "model.deep.lit", "model.new"]))
def test_the_value_is_read_back_and_the_rest_is_as_it_was(value, name):
    before, after = yaml.safe_load(TEXT), yaml.safe_load(apply(TEXT, {name: value}))
    *sections, key = name.split(".")
    place_before, place_after = before, after
    for section in sections:
        place_before, place_after = place_before[section], place_after[section]
    assert place_after[key] == value
    place_before[key] = place_after[key] = None
    assert after == before


def test_comments_and_order_stay():
    assert apply(TEXT, {"model.deep.lit": False}) == TEXT.replace("true", "false")


def test_no_overrides_change_no_byte():
    assert apply("a:   1\n", {}) == "a:   1\n"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("sed", "'sed'.*at the top there: seed, model"),
        ("model.deeper.lit", "no section 'deeper' at model; there: widths, deep"),
        ("seed.x.y", "no section 'x' at seed; there: a single value"),
        ("seed.x", "'seed.x'"),
    ],
)
def test_a_wrong_name_lists_what_there_is(name, message):
    with pytest.raises(ConfigError, match=message):
        apply(TEXT, {name: 1})
