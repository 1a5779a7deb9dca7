import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.entropy.controllers.aent import AentLaw
from pipeline.entropy.controllers.bang_bang import BangBangLaw
from pipeline.entropy.controllers.entropic import EntropicLaw
from pipeline.entropy.controllers.pi import PiLaw
from pipeline.entropy.controllers.scope import LIMITS, ScopeLaw
from pipeline.entropy.controllers.skywork import SkyworkLaw
from pipeline.entropy.gains import proportional_gain
from pipeline.entropy.law import Course
from pipeline.entropy.observer import DELAYS
from pipeline.entropy.sensor import Sensor


@pytest.mark.parametrize(("entropy", "temperature"), [(0.5, 1.0), (0.4, 1.1), (0.55, 0.95), (0.1, 1.2), (2.0, 0.8)])
def test_scope_is_the_published_clip(entropy, temperature):
    assert math.exp(ScopeLaw(*LIMITS).propose(entropy, 0.5, 0.0, 0)) == pytest.approx(temperature)


def test_bang_bang_switches_at_the_target():
    law = BangBangLaw(0.8, 1.2)
    assert [math.exp(law.propose(h, 0.5, 0.0, 0)) for h in (0.49, 0.5, 0.51)] == pytest.approx([1.2, 1.2, 0.8])


def test_skywork_counts_up_and_down_and_is_on_below_the_target_only():
    law = SkyworkLaw(0.002, 0.005)
    given = [law.propose(h, 0.3, 0.0, 0) for h in (0.2, 0.2, 0.2, 0.4, 0.3, 0.2)]
    assert given == pytest.approx([0.002, 0.004, 0.005, 0.0, 0.0, 0.003])
    law.forget()
    assert law.propose(0.4, 0.3, 0.0, 0) == law.coefficient == 0.0


def test_aent_integrates_the_distance_to_the_band_within_its_box():
    law = AentLaw(0.01, 0.001, 0.004)
    band = Course(0.2, 0.5)
    given = [law.propose(h, 0.3, 0.0, 0, band) for h in (0.3, 0.1, 0.0, 0.1, 0.7, 0.9)]
    assert given == pytest.approx([0.001, 0.002, 0.004, 0.004, 0.002, 0.001])
    law.coefficient = 0.003
    law.forget()
    assert law.coefficient == 0.001


def test_entropic_is_pi_in_nats_with_the_errors_before():
    law = EntropicLaw(1.0, 0.01, -1.0, 1.0)
    given = [law.propose(h, 0.5, 0.0, 0) for h in (0.4, 0.4, 0.6, 3.0, 0.5)]
    assert given == pytest.approx([0.1, 0.1 + 0.01 * 0.1, -0.1 + 0.01 * 0.2, -1.0, 0.01 * (0.1 - 2.5)])
    law.total = 5.0
    law.forget()
    assert law.total == 0.0


def test_pi_by_hand():
    law = PiLaw(2.0, 0.1, -1.0, 1.0, adapt=False)  # made for a plant of gain b = 1 / (2 * 22)
    e = math.log(0.3 / 0.25)
    assert law.propose(0.25, 0.3, 0.0, 0) == pytest.approx(2 * e)
    falling = PiLaw(2.0, 0.1, -1.0, 1.0, adapt=False)
    assert falling.propose(0.25, 0.3, 0.0, 0, Course(slope=-0.004)) == pytest.approx(2 * (e - 26 * 0.004))
    sent = 2 * e / 44  # by which the next reading will be higher, and nothing was missed
    assert law.propose(0.25, 0.3, 2 * e, 0) == pytest.approx(2 * (e - sent))
    # A quarter of the command is felt. The reading is above the prediction: the prediction follows as far as a line
    # through three readings does, the integral takes it for drift, which is larger at the target; and for three steps
    # on average the entropy will go on as it goes now.
    felt = sent / 4
    missed = e - felt
    drift = 0.1 / 44 * missed / math.sqrt(0.25)
    level = math.log(0.25) + felt + 10 / 12 * missed
    ahead = level + 3 * felt + sent + 4 * drift * math.exp(level / 2)
    expected = 2 * (math.log(0.3) - ahead) - 44 * drift * math.sqrt(0.3)
    assert law.propose(0.3, 0.3, 2 * e, 0) == pytest.approx(expected)


def test_pi_predicts_a_plant_of_the_gain_it_was_made_for():
    law = PiLaw(2.0, 0.1, -1.0, 1.0, adapt=False)
    sent, felt, y = 0.0, 0.0, math.log(0.25)
    for _ in range(60):
        proposed = law.propose(math.exp(y), 0.3, sent, 0)
        assert law.plant.levels == pytest.approx([y], abs=1e-9)
        felt += (sent - felt) / 4  # the optimizer's momentum
        y += felt / 44
        sent = proposed
    assert law.plant.drift_at(0.0) == pytest.approx(0, abs=1e-9)
    assert math.exp(y) == pytest.approx(0.3, rel=0.02)


def test_pi_error_is_clipped_at_one():
    assert PiLaw(2.0, 0.0, -9.0, 9.0, adapt=False).propose(1e-3, 3.0, 0.0, 0) == 2.0


def test_pi_does_not_wind_up_at_a_limit_and_leaves_it_before_the_target_is_crossed():
    law = PiLaw(4.0, 0.1, -0.5, 0.5, adapt=False)
    for _ in range(1000):
        assert law.propose(0.1, 0.3, 0.5, 0) == 0.5
    assert -law.plant.drift_at(law.plant.levels[0]) / law.plant.gain <= 0.5
    entropy, last = 0.1, 0.5
    while last == 0.5 and entropy < 0.31:
        entropy *= 1.01
        last = law.propose(entropy, 0.3, last, 0)
    assert entropy < 0.3


def test_pi_slew_and_dead_band():
    law = PiLaw(4.0, 0.0, -1.0, 1.0, slew=0.1, dead_band=0.05, adapt=False)
    assert law.propose(0.1, 0.3, 0.0, 0) == pytest.approx(0.1)
    assert law.propose(0.1, 0.3, 0.1, 0) == pytest.approx(0.2)
    for beyond, expected in ((0.049, 0.0), (0.06, -4 * 0.01)):
        law = PiLaw(4.0, 0.0, -1.0, 1.0, dead_band=0.05, adapt=False)
        assert law.propose(0.3 * math.exp(beyond), 0.3, 0.0, 0) == pytest.approx(expected)


@pytest.mark.parametrize("staleness", [0, 2, 2.5])
def test_pi_counts_what_was_sent_and_is_not_felt_yet(staleness):
    """What momentum still holds back, and the commands of the updates that no reading has seen; nothing twice."""
    law = PiLaw(2.0, 0.0, -1.0, 1.0, adapt=False)
    e = math.log(0.3 / 0.25)
    for last in (0.0, 0.0, 0.0, 0.0, 0.1, 0.1, 0.1, 0.1):
        proposed = law.propose(0.25, 0.3, last, staleness)
    felt = law.plant.felt[0]
    sent = 0.1 * min(4, 1 + staleness)
    assert proposed == pytest.approx(2 * (e - (3 * felt + sent) / 44))


def test_pi_expects_the_effect_of_a_command_later_with_stale_rollouts():
    for staleness, first in ((0, 1), (2, 3)):
        law = PiLaw(2.0, 0.01, -1.0, 1.0, adapt=False)
        predictions = []
        for k in range(9):
            law.propose(0.25, 0.3, 0.5 if k else 0.0, staleness)
            predictions.append(law.plant.levels[0])
        moved = [k for k in range(9) if predictions[k] != predictions[0]]
        assert moved[0] == first + 1


@given(st.lists(st.tuples(st.floats(-1, 1), st.integers(0, 8), st.integers(0, 4)), min_size=1, max_size=80))
def test_the_observer_is_told_the_command_that_acted_at_the_measured_age(steps):
    """However ages vary from step to step; between two ages, a mean of their commands."""
    law, told = PiLaw(2.0, 0.01, -1.0, 1.0), []
    observe = law.plant.observe
    law.plant.observe = lambda reading, acted: (told.append(acted), observe(reading, acted))
    for last, age, quarters in steps:
        law.propose(0.25, 0.3, last, age + quarters / 4)
    commands = [last for last, *_ in steps]
    for k, (_, age, quarters) in enumerate(steps):
        for delay, acted in zip(DELAYS, told[k], strict=True):
            late, early = (commands[max(0, k - 1 - ago - round(delay))] for ago in (age, age + 1))
            assert acted == pytest.approx(late + quarters / 4 * (early - late))


def test_proportional_gain_is_that_of_internal_model_control():
    assert proportional_gain(0.0114) == pytest.approx(1 / (0.0114 * (16 + 6)))
    assert proportional_gain(0.0114, staleness=2) == pytest.approx(1 / (0.0114 * (16 + 6 + 2)))


def test_sensor_smooths_and_floors():
    sensor = Sensor(ema=0.8)
    assert [sensor.filter(h) for h in (0.5, 0.0, 1.0)] == pytest.approx([0.5, 0.4, 0.52])
    assert Sensor().filter(0.0) == 1e-3


def test_hampel_pulls_one_outlier_back_and_follows_a_step():
    sensor = Sensor(window=7)
    for h in (0.30, 0.31, 0.29, 0.30, 0.31, 0.29):
        assert sensor.filter(h) == h
    assert sensor.filter(3.0) == pytest.approx(0.30 + 4 * 1.4826 * 0.01 + 0.02 * 0.30)
    values = [sensor.filter(0.5) for _ in range(6)]
    assert values[0] < 0.4
    assert values[-1] == 0.5
