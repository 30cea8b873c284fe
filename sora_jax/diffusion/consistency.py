"""Consistency distillation: a student learns the large jumps of the path that a teacher walks.

The times 1 = u_N > ... > u_0 = 0 are cut into K equal segments. The student's velocity u(x, t) is
that of a whole jump, from t to the lower edge e of t's segment:

    (1)  f(x, t) = x + (e - t) u(x, t)                        f(x, e) = x, whatever u is

The teacher takes one small step, from x at t to x' at t' with e <= t' < t, at a mean velocity v.
Both points lie on one path, so their jumps should end in one point, f(x, t) = f(x', t'). Divided by
e - t that is

    (2)  u(x, t) = r v + (1 - r) u'(x', t'),                  r = (t - t') / (t - e)

with u' an average of past students, which is not differentiated. Where (2) holds everywhere, one
jump is the teacher's walk to the edge. K = 1 is a consistency model; with more segments, K Euler
steps from edge to edge walk the teacher's path. With K = N the student learns the teacher's
guidance alone.

Source: Song et al., arXiv 2303.01469, algorithm 2, with the squared distance of velocities in the
place of that of ends; segments: Heek et al., arXiv 2403.06807; a guided teacher: Luo et al.,
arXiv 2310.04378, with one fixed scale.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from sora_jax.core.errors import UserError

TEACHER_SOLVERS = ("euler", "heun")


@dataclasses.dataclass(frozen=True)
class DistillConfig:
    """Few-step distillation of the model that config.init.weights names (docs/distill.md)."""

    guidance: float = 3.0  # of the teacher; it becomes part of the student. 1 = none
    guidance_interval: tuple[float, float] = (0.0, 1.0)  # times of a clip where it is guided
    num_steps: int = 32  # of the teacher's walk from noise to data
    solver: str = "euler"  # of its steps: euler | heun
    segments: int = 4  # that the student crosses in one step each; 1: a consistency model

    def __post_init__(self):
        if self.solver not in TEACHER_SOLVERS:
            raise UserError(f"distill.solver = {self.solver!r} is unknown; allowed: "
                            f"{', '.join(TEACHER_SOLVERS)}")
        if not 0 <= self.guidance < math.inf:
            raise UserError(f"distill.guidance = {self.guidance} must not be negative; 1 is none")
        first, last = self.guidance_interval
        if not 0 <= first <= last <= 1:
            raise UserError(
                f"distill.guidance_interval = {self.guidance_interval} must be two times from 0 "
                "(data) to 1 (noise), smaller first")
        if self.segments < 1 or self.num_steps < 1 or self.num_steps % self.segments:
            raise UserError(
                f"distill.num_steps = {self.num_steps} of the teacher must be a multiple of "
                f"distill.segments = {self.segments}, both at least 1")


def check_student(config: DistillConfig, sampling) -> None:
    """Raises UserError where a student would not be sampled as it is trained.

    sampling: anything with the fields of config.sampling.
    """
    if sampling.guidance != 1:
        raise UserError(f"sampling.guidance = {sampling.guidance:g}, but distill.guidance is part "
                        "of what the student learns; set it to 1")
    jumps = sampling.sampler in ("euler", "ddim") and sampling.grid == "flow" and not sampling.eta
    if not (jumps and sampling.num_steps == config.segments) and not (
            config.segments == 1 and sampling.sampler == "consistency"):
        raise UserError(
            f"sampling.sampler = {sampling.sampler} with num_steps = {sampling.num_steps} on grid "
            f"{sampling.grid}: a student of distill.segments = {config.segments} is sampled by "
            "euler in that many steps on grid flow, or by consistency in any number where there "
            "is one segment")


def grid_times(number, num_steps: int, num_segments: int):
    """(t, t', e) before any shift, of the small step `number` in 1 .. num_steps.

    num_steps: of the teacher from noise to data, a multiple of num_segments.
    """
    per_segment = num_steps // num_segments
    edge = (number - 1) // per_segment * per_segment
    return number / num_steps, (number - 1) / num_steps, edge / num_steps


def small_step(velocity, x, time, next_time, solver: str, expand=lambda time: time):
    """(x', mean velocity) of one step of the teacher.

    velocity: (x, time) -> velocity shaped as x; expand: turns times into what broadcasts against x.
    """
    length = expand(next_time - time)
    v = velocity(x, time)
    if solver == "heun":
        v = 0.5 * (v + velocity(x + length * v, next_time))
    return x + length * v, v


def target(teacher, average, x, time, next_time, edge, solver: str, expand=lambda time: time):
    """What (2) asks of the student at (x, time), without gradient.

    teacher, average: (x, time) -> velocity, of the teacher and of the averaged student.
    """
    next_x, v = small_step(teacher, x, time, next_time, solver, expand)
    whole = time - edge
    share = expand(jnp.where(whole > 0, (time - next_time) / jnp.where(whole > 0, whole, 1), 1))
    return jax.lax.stop_gradient(share * v + (1 - share) * average(next_x, next_time))
