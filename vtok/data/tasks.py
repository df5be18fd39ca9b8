"""Which share of a job this process does: workers that never talk to each other, and can be restarted one by one.

Extraction and sampling are cut into numbered pieces; task t of n does those with number % n == t and skips what is
there already. torchrun, a SLURM array and plain processes are only ways of starting them.
"""

from __future__ import annotations

from collections.abc import Mapping


def task_from_environment(task_id: int | None, num_tasks: int | None, env: Mapping[str, str]) -> tuple[int, int]:
    """(task, tasks) from the flags, else torchrun, else a SLURM array (whose ids need not start at 0), else (0, 1)."""
    if (task_id is None) != (num_tasks is None):
        raise ValueError("give task_id and num_tasks together, or neither")
    if task_id is not None:
        task, tasks = task_id, num_tasks
    elif "RANK" in env and "WORLD_SIZE" in env:
        task, tasks = int(env["RANK"]), int(env["WORLD_SIZE"])
    elif "SLURM_ARRAY_TASK_ID" in env:
        first, last = (int(env.get(f"SLURM_ARRAY_TASK_{k}", env["SLURM_ARRAY_TASK_ID"])) for k in ("MIN", "MAX"))
        step = int(env.get("SLURM_ARRAY_TASK_STEP", 1))
        task, tasks = (int(env["SLURM_ARRAY_TASK_ID"]) - first) // step, (last - first) // step + 1
        if tasks != int(env.get("SLURM_ARRAY_TASK_COUNT", tasks)):
            raise ValueError("the SLURM array has gaps; submit it as a range, or pass task_id and num_tasks")
    else:
        task, tasks = 0, 1
    if not 0 <= task < tasks:
        raise ValueError(f"task_id={task} must lie in 0..{tasks - 1} (num_tasks={tasks})")
    return task, tasks
