"""The kinematics of the Franka Panda arm, for many configurations at once.

Every joint frame follows from the one before by Rx(alpha) Tx(a) Rz(q) Tz(d): Craig's convention of
Denavit and Hartenberg (Craig, Introduction to Robotics, section 3.4). Parameters and limits are the
published ones: Franka Control Interface documentation, "Robot and interface specifications", Panda.
Metres and radians; the base is the origin, x forward, y left, z up.
"""

import numpy as np

A = np.array([0.0, 0.0, 0.0, 0.0825, -0.0825, 0.0, 0.088])
D = np.array([0.333, 0.0, 0.316, 0.0, 0.384, 0.0, 0.0])
ALPHA = np.array([0.0, -np.pi / 2, np.pi / 2, np.pi / 2, -np.pi / 2, np.pi / 2, np.pi / 2])
TIP = 0.107 + 0.1034  # metres along z of the last joint: to the flange, then to between the fingers

LOW = np.array([-2.8973, -1.7628, -2.8973, -3.0718, -2.8973, -0.0175, -2.8973])  # rad
HIGH = np.array([2.8973, 1.7628, 2.8973, -0.0698, 2.8973, 3.7525, 2.8973])
SPEED = 0.99 * np.array(
    [2.1750, 2.1750, 2.1750, 2.1750, 2.6100, 2.6100, 2.6100]
)  # rad/s; a hundredth below
MARGIN = 0.05  # rad; what is asked of a joint stays this far within its limits

REST = np.array([0.0, -np.pi / 4, 0.0, -3 * np.pi / 4, 0.0, np.pi / 2, np.pi / 4])  # the hand down
DOWN = np.array([[1.0, -1.0, 0.0], [-1.0, -1.0, 0.0], [0.0, 0.0, -(2**0.5)]]) / 2**0.5
DAMPING = 0.03
TURN = 5.0  # 1/s; how fast the hand turns back down
POSTURE = 3.0  # 1/s; how fast the elbow swings back to rest, where the tip does not mind


def chain(angles: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return where joint angles (..., 7) take the tip.

    Returns:
        The tip (..., 3) in metres, the rotation (..., 3, 3) of the last joint's frame, and the
        Jacobian (..., 6, 7): linear velocity of the tip above angular velocity of the hand.

    Example:
        >>> tip, rotation, jacobian = chain(REST)
        >>> tip[[0, 2]].round(3).tolist(), bool(np.allclose(rotation, DOWN))
        ([0.307, 0.487], True)
    """
    x, y, z = np.broadcast_to(np.eye(3)[:, *[None] * (angles.ndim - 1)], (3, *angles.shape[:-1], 3))
    place = np.zeros_like(x)
    places, axes = [], []
    for joint in range(7):
        cosine, sine = np.cos(ALPHA[joint]), np.sin(ALPHA[joint])
        y, z = cosine * y + sine * z, cosine * z - sine * y
        place = place + A[joint] * x + D[joint] * z
        cosine, sine = np.cos(angles[..., joint, None]), np.sin(angles[..., joint, None])
        x, y = cosine * x + sine * y, cosine * y - sine * x
        places.append(place)
        axes.append(z)
    tip = place + TIP * z
    axis, lever = np.stack(axes, -1), tip[..., None] - np.stack(places, -1)
    linear = np.cross(axis, lever, axis=-2)
    return tip, np.stack([x, y, z], -1), np.concatenate([linear, axis], -2)


def follow(angles: np.ndarray, velocity: np.ndarray) -> np.ndarray:
    """Return joint velocities (..., 7) that move the tip with a velocity (..., 3) in m/s.

    Damped least squares (Nakamura and Hanafusa 1986): J' (J J' + damping^2)^-1 of what is asked
    for. The hand is turned down at the same time, and what is left of the seven joints returns to
    `REST`, so that a resting place of the tip has one posture. No joint exceeds `SPEED`: all are
    slowed alike.
    """
    _, rotation, jacobian = chain(angles)
    turn = TURN * 0.5 * np.cross(rotation, DOWN, axis=-2).sum(-1)
    asked = np.concatenate([velocity, turn], -1)
    transposed = np.swapaxes(jacobian, -1, -2)
    inverse = transposed @ np.linalg.inv(jacobian @ transposed + DAMPING**2 * np.eye(6))
    back = POSTURE * (REST - angles)
    for _ in range(2):  # twice, since the damping lets a little of the first through to the tip
        back = back - _apply(inverse, _apply(jacobian, back))
    speeds = _apply(inverse, asked) + back
    return speeds / np.maximum(1.0, np.abs(speeds / SPEED).max(-1, keepdims=True))


def posture(place: np.ndarray) -> np.ndarray:
    """Return the joint angles (7,) that rest with the tip at a place (3,), the hand down.

    Raises:
        ValueError: the arm does not get there.
    """
    angles = REST
    for _ in range(100):
        before, gap = angles, place - chain(angles)[0]
        angles = np.clip(angles + 0.1 * follow(angles, 10.0 * gap), LOW + MARGIN, HIGH - MARGIN)
        if np.abs(angles - before).max() < 1e-6:
            break
    if np.abs(chain(angles)[0] - place).max() > 1e-3:
        raise ValueError(f"the hand, held down, does not reach {place.tolist()} (metres)")
    return angles


def _apply(matrix: np.ndarray, vector: np.ndarray) -> np.ndarray:
    return (matrix @ vector[..., None])[..., 0]
