import math
from dataclasses import replace

import numpy as np
import pytest

from pipeline.config.schema import ACTUATORS, BandConfig, EntropyConfig, PiConfig
from pipeline.entropy.actuator import actuator_called
from pipeline.entropy.calibrate import calibration
from pipeline.entropy.excitation import PERIOD, Excitation
from pipeline.entropy.gains import KI_PER_KP, proportional_gain
from pipeline.entropy.identify import IdentificationError, Record, identify
from pipeline.entropy.plant import Plant, Scenario, simulate
from pipeline.types import EntropyReading

PLANT = Plant(gain=0.025, drift=-0.009, lag=1, process_noise=0.009, sensor_noise=0.06)


def noiseless(gain, drift, delay, commands, start=0.4):
    """ln H by hand: before step k every command up to k - 1 - delay has acted."""
    y = [math.log(start)]
    for k in range(len(commands) - 1):
        y.append(y[-1] + drift + gain * (commands[k - delay] if k >= delay else 0.0))
    return Record(np.exp(y), np.array(commands))


def square(n, high=0.8):
    return [high if k // 20 % 2 == 0 else 0.0 for k in range(n)]


@pytest.mark.parametrize("delay", [0, 3])
def test_exact_data_give_the_exact_plant(delay):
    found = identify([noiseless(0.02, -0.005, delay, square(120))])
    assert found.gain == pytest.approx(0.02, rel=1e-6)
    assert found.drift == pytest.approx(-0.005, rel=1e-6)
    assert found.delay == delay
    assert found.delay_interval == (delay, delay)
    assert found.sensor_noise < 1e-6
    assert found.rest == pytest.approx(0.25, rel=1e-6)


def record(seed, delay=0, steps=200):
    trace = simulate(EntropyConfig(), Scenario("identify", replace(PLANT, delay=delay), steps=steps), seed, delay)
    return Record(trace.readings, trace.commands)


def test_intervals_hold_the_truth_while_a_controller_is_in_the_loop():
    found = [identify([record(seed, delay)]) for delay in (0, 2) for seed in range(6)]
    inside = [f.gain_interval[0] <= 0.025 <= f.gain_interval[1] for f in found]
    assert np.mean(inside) >= 0.8
    assert np.mean([f.drift_interval[0] <= -0.009 <= f.drift_interval[1] for f in found]) >= 0.7
    assert np.mean([f.gain for f in found]) == pytest.approx(0.025, rel=0.1)
    assert np.mean([f.sensor_noise for f in found]) == pytest.approx(0.06, rel=0.1)
    assert np.mean([f.process_noise for f in found]) == pytest.approx(0.009, rel=0.5)


def test_several_records_narrow_the_interval():
    one, many = identify([record(0)]), identify([record(seed) for seed in range(4)])
    assert np.ptp(many.gain_interval) < 0.7 * np.ptp(one.gain_interval)
    assert many.steps == 800


def test_missing_readings_cut_the_record():
    whole = noiseless(0.02, -0.005, 0, square(120))
    holes = whole.entropy.copy()
    holes[[30, 31, 70]] = math.nan
    found = identify([Record(holes, whole.command)])
    assert found.steps == 117
    assert found.gain == pytest.approx(0.02, rel=1e-6)


def test_data_that_cannot_tell_are_refused():
    with pytest.raises(IdentificationError, match="19 steps"):
        identify([noiseless(0.02, -0.005, 0, square(19))])
    with pytest.raises(IdentificationError, match="never varied"):
        identify([noiseless(0.02, -0.005, 0, [0.3] * 60)])
    with pytest.raises(IdentificationError, match="in the last steps only"):
        identify([noiseless(0.02, -0.005, 0, [0.0] * 59 + [0.3])])


@pytest.mark.parametrize("late", [2, 5, 10])
def test_a_command_that_moved_late_tells_a_wide_interval_and_no_nan(late):
    """At long delays such a command has not acted yet."""
    noise = 0.05 * np.random.default_rng(0).standard_normal(60)
    found = identify(
        [Record(0.5 * np.exp(noise - 0.008 * np.arange(60)), np.array([0.0] * (60 - late) + [0.3] * late))]
    )
    assert found.gain_interval[0] < 0 < found.gain_interval[1]
    assert found.drift == pytest.approx(-0.008, rel=0.2)
    assert found.delay_interval[1] < late


def test_calibration_gives_the_gains_of_internal_model_control():
    found = calibration(EntropyConfig(), [noiseless(0.02, -0.005, 0, square(120))])
    assert found.kp == pytest.approx(proportional_gain(0.02), rel=0.01)
    assert found.ki == pytest.approx(KI_PER_KP * found.kp, rel=0.01)
    assert found.overrides == [f"entropy.pi.kp={found.kp:g}", f"entropy.pi.ki={found.ki:g}"]
    assert found.rest_command == pytest.approx(math.exp(0.25))
    assert found.reachable
    assert found.predictions["proposed"].rms < 0.05
    assert found.predictions["proposed"].time_in_band > 0.95


def test_calibration_lengthens_the_dead_time_by_what_momentum_does_not_explain():
    found = calibration(EntropyConfig(), [noiseless(0.02, -0.005, 7, square(160))])
    assert found.kp == pytest.approx(proportional_gain(0.02, 4), rel=0.01)


def test_calibration_mends_gains_that_are_far_too_high():
    config = EntropyConfig(band=BandConfig(low=0.72, high=0.88), pi=PiConfig(adapt=False))
    plant = Plant(gain=0.1, drift=-0.01, lag=4, sensor_noise=0.03)
    trace = simulate(config, Scenario("fast", plant, start=1.2, target=0.8, steps=200), 0)
    found = calibration(config, [Record(trace.readings, trace.commands)])
    assert found.predictions["proposed"].rms < found.predictions["present"].rms
    assert found.predictions["proposed"].variation < found.predictions["present"].variation


def test_an_unreachable_rest_command_is_said_and_an_unknown_sign_refused():
    weak = calibration(EntropyConfig(actuator="resample"), [noiseless(0.004, -0.004, 0, square(120))])
    assert not weak.reachable
    with pytest.raises(IdentificationError, match="acts against its command"):
        calibration(EntropyConfig(), [noiseless(-0.02, -0.005, 0, square(120))])


@pytest.mark.parametrize("actuator", ACTUATORS)
def test_excitation_switches_within_the_limits_and_identifies(actuator):
    row = actuator_called(actuator)
    excitation = Excitation(EntropyConfig(actuator=actuator))
    decisions = [excitation.initial()]
    decisions += [excitation.update(EntropyReading(30.0, 100.0, k), 1) for k in range(4 * PERIOD - 1)]
    u = [row.to_u(d.command) for d in decisions]
    assert all(row.lower <= d.command <= row.upper for d in decisions)
    assert [u[k * PERIOD] for k in range(4)] == pytest.approx([*excitation.levels] * 2)
    assert len({round(value, 9) for value in u}) == 2
    assert identify([noiseless(0.02, -0.005, 2, u)]).gain == pytest.approx(0.02, rel=1e-5)


def test_excitation_continues_where_it_was_saved():
    whole, resumed = Excitation(EntropyConfig()), Excitation(EntropyConfig())
    reading = EntropyReading(30.0, 100.0, 0)
    for _ in range(PERIOD - 1):
        whole.update(reading, 1)
    resumed.load_state_dict(whole.state_dict())
    assert resumed.update(reading, 1) == whole.update(reading, 1)
