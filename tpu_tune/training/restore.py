"""The state that a start goes on from: the last checkpoint's."""

from __future__ import annotations

from collections.abc import Callable

from tpu_tune.checkpoints.run_checkpoints import RunCheckpoints
from tpu_tune.errors import UserError
from tpu_tune.training.meter import LoopState
from tpu_tune.training.opening import Session
from tpu_tune.training.prepare_steps import Steps
from tpu_tune.training.step import TrainState


def restore(
    checkpoints: RunCheckpoints, steps: Steps, session: Session, say: Callable[[str], None]
) -> tuple[TrainState, LoopState]:
    """Return the last checkpoint's state and counts, or fresh ones; `say` hears from which step the run goes on."""
    state, loop_state = steps.initial_state, LoopState()
    rows = session.length.batch
    restored = checkpoints.restore(state)
    if restored is not None:
        state, loop_state = restored[0], LoopState.from_saved(restored[1])
        checkpoints.best_step = loop_state.best_step or None
        say(f"resuming from step {int(state.step)} of {session.length.total_steps}")
        if loop_state.rows not in (0, rows):
            say(
                f"a step was {loop_state.rows} rows and is now {rows}, because the mesh has changed: order and "
                "schedule are new from here on"
            )
    loop_state.rows = rows
    return state, loop_state


def check_same_step(step: int, main_step: int) -> None:
    """Hold against a process that read another checkpoint than process 0.

    Raises:
      UserError: it did.
    """
    if step != main_step:
        raise UserError(
            f"read checkpoint {step} where process 0 read {main_step}: a damaged one, or an output_dir that is not the "
            "same for all hosts; use a gs:// path or a shared disk"
        )
