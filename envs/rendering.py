"""Pictures from MuJoCo without a screen: the choice of OpenGL, and one kept renderer for each env.

Multisampling, by far the largest cost in software rendering, is off; edges are smoothed by
rendering at twice the size and averaging 2 x 2 pixels instead.
"""

# pyright: reportAttributeAccessIssue=false
# (mujoco's names come from a compiled module without stubs)

import ctypes
import importlib
import os
import sys
import weakref

import numpy as np

from jepa_world.envs import EnvError


class SmoothRenderer:
    """Render one fixed camera of a model as (size, size, 3) bytes; `close()` frees the context.

    Raises:
        EnvError: no OpenGL that works without a screen.

    Example:
        >>> choose_gl()
        >>> import mujoco
        >>> model = mujoco.MjModel.from_xml_string(
        ...     "<mujoco><worldbody><camera/></worldbody></mujoco>"
        ... )
        >>> SmoothRenderer(model, size=8, camera=0)(mujoco.MjData(model)).shape
        (8, 8, 3)
    """

    def __init__(self, model, *, size: int, camera: str | int):
        choose_gl()
        import mujoco

        self._camera = camera
        self._buffer = np.empty((2 * size, 2 * size, 3), np.uint8)
        model.vis.quality.offsamples = 0
        model.vis.global_.offwidth = model.vis.global_.offheight = 2 * size
        try:
            self._renderer = mujoco.Renderer(model, 2 * size, 2 * size)
        except (ImportError, OSError, RuntimeError, AttributeError, mujoco.FatalError) as error:
            raise EnvError(_missing_gl(str(error))) from error
        # before Python's exit, at which OpenGL may already be gone
        self.close = weakref.finalize(self, self._renderer.close)
        for flag in (mujoco.mjtRndFlag.mjRND_SHADOW, mujoco.mjtRndFlag.mjRND_REFLECTION):
            self._renderer.scene.flags[flag] = False

    def __call__(self, data) -> np.ndarray:
        """Render the state whose kinematics `data` holds."""
        self._renderer.update_scene(data, self._camera)
        wide = self._renderer.render(out=self._buffer).astype(np.uint16)
        rows = wide[0::2] + wide[1::2]
        return ((rows[:, 0::2] + rows[:, 1::2] + 2) >> 2).astype(np.uint8)


def choose_gl() -> None:
    """Set MUJOCO_GL on Linux, where it is unset, to what works without a screen: EGL, then OSMesa.

    MuJoCo reads it when it is imported, so this comes first; a MuJoCo that was imported before is
    pointed at the choice. Where neither works it stays unset and MuJoCo uses the screen. Software
    rendering stays in the calling thread (LP_NUM_THREADS): for small pictures Mesa's own threads
    cost more than they give.

    Raises:
        EnvError: MUJOCO_GL asks for what is not there, or there is nothing to draw with.
    """
    if sys.platform != "linux":
        return
    os.environ.setdefault("LP_NUM_THREADS", "0")
    works = {"egl": _egl_has_device, "osmesa": _osmesa_loads}
    asked = os.environ.get("MUJOCO_GL", "")
    if asked in works and not works[asked]():
        raise EnvError(_missing_gl("its library or a device is missing"))
    chosen = asked or next((name for name, check in works.items() if check()), "glfw")
    if chosen == "glfw" and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        raise EnvError(_missing_gl("there is no screen, nor EGL or OSMesa without one"))
    if asked or chosen == "glfw":
        return
    os.environ["MUJOCO_GL"] = chosen
    if "mujoco" in sys.modules:
        import mujoco

        renderer = sys.modules[mujoco.Renderer.__module__]
        renderer.gl_context.GLContext = importlib.import_module(f"mujoco.{chosen}").GLContext


def _egl_has_device() -> bool:
    library = _loads("libEGL.so.1")
    if library is None:
        return False
    library.eglGetProcAddress.restype = ctypes.c_void_p
    address = library.eglGetProcAddress(b"eglQueryDevicesEXT")
    if not address:
        return False
    signature = ctypes.CFUNCTYPE(ctypes.c_uint, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
    count = ctypes.c_int(0)
    found = signature(address)(0, None, ctypes.byref(count))
    return bool(found) and count.value > 0


def _osmesa_loads() -> bool:
    return any(_loads(f"libOSMesa.so.{version}") for version in (8, 6))


def _loads(name: str) -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL(name)
    except OSError:
        return None


def _missing_gl(cause: str) -> str:
    return (
        f"OpenGL does not start (MUJOCO_GL={os.environ.get('MUJOCO_GL', '')!r}: "
        f"{' '.join(cause.split())}): on Debian and Ubuntu install libegl1, or libosmesa6"
    )
