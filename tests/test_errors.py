import pytest

from tdm_r1.errors import ConfigError, LoadError, RewardError, TdmError, closest


def test_closest_suggests_only_what_is_near():
    assert closest("eulr", ["euler", "dpm2m"]) == " Did you mean 'euler'?"
    assert closest("zzz", ["euler", "dpm2m"]) == ""
    assert closest("", []) == ""


@pytest.mark.parametrize("kind", [ConfigError, LoadError])
def test_a_users_mistake_is_also_a_value_error(kind):
    assert issubclass(kind, ValueError) and issubclass(kind, ConfigError)


def test_a_misbehaving_reward_is_not_the_users_mistake():
    assert issubclass(RewardError, TdmError) and not issubclass(RewardError, ValueError)
