"""Who changes its role and when, said with literal views; a forecast that forgets what is over; decisions that replay."""

from dataclasses import replace

from common.policy.load_forecast import ForecastPace, LoadForecast
from common.policy.role_control import RoleControlSettings, RoleDecision, RoleGuard, Trial, decide
from common.policy.role_demand import mean_of
from common.policy.role_view import MeshView, RoleMove, SeenRequest, WorkerView
from common.policy.step_time import DecodeLine, DecodeTime, PrefillTime, StepTime
from common.simulation.roles.role_controller import ControllerSettings, RoleController
from common.values.worker import Role

TIME = StepTime(
    prefill=PrefillTime(base_s=0.01, per_token_s=1e-4),
    decode=DecodeTime(line=DecodeLine(base_s=0.02, per_kv_token_s=5e-7, per_sequence_s=1e-4)),
)
READING = SeenRequest(prompt_tokens=2000, output_tokens=20, ttft_s=1.0, tpot_s=0.05)
WRITING = SeenRequest(prompt_tokens=50, output_tokens=300, ttft_s=1.0, tpot_s=0.05)
SETTINGS = RoleControlSettings()


def worker(name: str, role: Role, *, queue_s: float = 0.0, decoding: int = 0) -> WorkerView:
    return WorkerView(
        worker=name,
        role=role,
        prefill_queue_s=queue_s,
        decoding=decoding,
        decoding_kv_tokens=decoding * 200,
        tokens_left=100.0,
        kv_tokens=50_000,
        max_sequences=256,
    )


def view(*workers: WorkerView, now: float = 0.0, requests: tuple[SeenRequest, ...] = (READING,) * 12, free: bool = False) -> MeshView:
    return MeshView(now=now, seconds=1.0, arrived=len(requests), seen=requests, workers=workers, step_time=TIME, free=free)


def decided(guard: RoleGuard, seen: MeshView, gain: float) -> RoleDecision:
    def attempt(move: RoleMove) -> Trial:
        return Trial(move=move, stay=(0.5, 0.5), moved=(0.5 + gain, 0.5 + gain))

    mean = mean_of(seen.seen, [1.0] * len(seen.seen), seen)
    return decide(1, seen, guard, SETTINGS, mean=mean, rate=float(seen.arrived), attempt=attempt)


PRESSED = (worker("p", "prefill", queue_s=3.0), worker("d1", "decode", decoding=9), worker("d2", "decode", decoding=2))


def test_a_sure_gain_moves_the_worker_that_has_least_to_give_away() -> None:
    decision = decided(RoleGuard(SETTINGS), view(*PRESSED), 0.3)
    assert decision.move == RoleMove(worker="d2", role="prefill")


def test_a_small_gain_wants_to_be_seen_twice_and_chance_is_no_gain() -> None:
    guard = RoleGuard(SETTINGS)
    assert decided(guard, view(*PRESSED), 0.05).move is None
    assert decided(guard, view(*PRESSED, now=2.0), 0.05).move is not None
    doubtful = Trial(move=RoleMove(worker="d2", role="prefill"), stay=(0.5, 0.5), moved=(0.2, 1.0))
    assert not RoleGuard(SETTINGS).pays(doubtful, 0.0)


def test_no_two_changes_within_the_cooldown_and_none_while_one_is_under_way() -> None:
    guard = RoleGuard(SETTINGS)
    assert decided(guard, view(*PRESSED), 0.3).move is not None
    assert decided(guard, view(*PRESSED, now=9.9), 0.3).reason == "cooling down"
    changing = (*PRESSED[:2], replace(PRESSED[2], changing=True))
    assert decided(guard, view(*changing, now=30.0), 0.3).reason == "changing"
    assert decided(guard, view(*PRESSED, now=31.0), 0.3).move is not None


def test_no_phase_loses_its_last_worker() -> None:
    assert decided(RoleGuard(SETTINGS), view(*PRESSED[:2]), 0.9).reason == "no candidate"


def test_a_quiet_mesh_is_left_alone() -> None:
    quiet = view(worker("p", "prefill"), worker("d1", "decode"), worker("d2", "decode"), requests=(READING,))
    assert decided(RoleGuard(SETTINGS), quiet, 0.9).reason == "calm"


def test_a_phase_without_a_worker_gets_one_after_a_while_unless_placement_is_free() -> None:
    left = (worker("d1", "decode", decoding=5), worker("d2", "decode"))
    guard = RoleGuard(SETTINGS)
    assert decided(guard, view(*left), 0.0).move is None
    assert decided(guard, view(*left, now=5.0), 0.0).move == RoleMove(worker="d2", role="prefill")
    free = RoleGuard(SETTINGS)
    assert decided(free, view(*left, free=True), 0.0).move is None
    assert decided(free, view(*left, now=5.0, free=True), 0.0).move is None


def test_the_forecast_averages_one_load_and_forgets_another() -> None:
    forecast = LoadForecast(ForecastPace())
    for second in range(40):
        forecast.observe(1.0, 10 + (-1) ** second * 3, [WRITING] * 5)
    assert abs(forecast.rate_at(0.0) - 10.0) < 0.5
    assert forecast.known_s == 40.0
    for _ in range(6):
        forecast.observe(1.0, 30, [READING] * 10)
    assert forecast.known_s <= 8.0
    assert forecast.rate_at(0.0) > 25.0
    assert forecast.mix()[0].count(READING) > 3 * forecast.mix()[0].count(WRITING)


def test_the_same_views_give_the_same_decisions() -> None:
    def run() -> list[RoleDecision]:
        controller = RoleController(ControllerSettings())
        return [controller.decide(view(*PRESSED, now=float(second))) for second in range(6)]

    decisions = run()
    assert decisions == run()
    assert any(decision.trials for decision in decisions)
