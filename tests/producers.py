"""Hand-written DLPack producers: every kind of capsule there is, also ones no framework would make.

A producer counts how often it exported and how often its deleter ran. The structs are those of
dlpack.h, written here with ctypes and independent of csrc/dlpack.h.
"""

import ctypes

import numpy as np

CPU, CUDA, CUDA_HOST, ROCM = (1, 0), (2, 0), (3, 0), (10, 0)
READ_ONLY = 1

# (code, bits) of DLDataType
INT, UINT, FLOAT, BFLOAT, COMPLEX, BOOL = 0, 1, 2, 4, 5, 6


class Version(ctypes.Structure):
    _fields_ = [("major", ctypes.c_uint32), ("minor", ctypes.c_uint32)]


class Device(ctypes.Structure):
    _fields_ = [("type", ctypes.c_int32), ("id", ctypes.c_int32)]


class DataType(ctypes.Structure):
    _fields_ = [("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16)]


class Tensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device", Device),
        ("ndim", ctypes.c_int32),
        ("dtype", DataType),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


Deleter = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class Managed(ctypes.Structure):
    _fields_ = [("tensor", Tensor), ("context", ctypes.c_void_p), ("deleter", Deleter)]


class ManagedVersioned(ctypes.Structure):
    _fields_ = [
        ("version", Version),
        ("context", ctypes.c_void_p),
        ("deleter", Deleter),
        ("flags", ctypes.c_uint64),
        ("tensor", Tensor),
    ]


_api = ctypes.pythonapi
_api.PyCapsule_New.restype = ctypes.py_object
_api.PyCapsule_New.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
# The destructor gets a bare pointer: its reference count is 0, so it must not become an object.
_is_valid = ctypes.PyDLL(None).PyCapsule_IsValid
_is_valid.restype, _is_valid.argtypes = ctypes.c_int, [ctypes.c_void_p, ctypes.c_char_p]
_get_pointer = ctypes.PyDLL(None).PyCapsule_GetPointer
_get_pointer.restype, _get_pointer.argtypes = (
    ctypes.c_void_p,
    [ctypes.c_void_p, ctypes.c_char_p],
)

NAMES = {False: b"dltensor", True: b"dltensor_versioned"}
_alive = {}  # address of a managed tensor -> what it points to


@ctypes.CFUNCTYPE(None, ctypes.c_void_p)
def _destroy_capsule(capsule):
    """As a framework does: a capsule that nobody took frees its tensor."""
    for name in NAMES.values():
        if _is_valid(capsule, name):
            address = _get_pointer(capsule, name)
            _alive[address][0].deleter(address)


def dtype_code(dtype):
    """(code, bits) for a NumPy dtype."""
    dtype = np.dtype(dtype)
    if dtype.name == "bfloat16":
        return BFLOAT, 16
    if dtype.kind == "b":
        return BOOL, 8
    return {"i": INT, "u": UINT, "f": FLOAT, "c": COMPLEX}[dtype.kind], 8 * dtype.itemsize


class Producer:
    """Exports `array`, or whatever the keywords say instead of it.

    versioned     a "dltensor_versioned" capsule where the consumer takes one; False: never
    null_strides  strides NULL: compact
    before        bytes: data points that far before the first element, byte_offset makes up for it
    """

    def __init__(
        self,
        array,
        *,
        versioned=True,
        version=(1, 0),
        flags=0,
        device=CPU,
        shape=None,
        strides=None,
        null_strides=False,
        before=0,
        null_data=False,
        null_shape=False,
        code=None,
        bits=None,
        lanes=1,
        ndim=None,
        device_says=None,
        export_error=None,
    ):
        self.array, self.versioned, self.version, self.flags = array, versioned, version, flags
        self.device, self.null_strides, self.before = device, null_strides, before
        self.shape = tuple(array.shape if shape is None else shape)
        if strides is None:
            strides = [s // array.itemsize for s in array.strides]
        self.strides = tuple(strides)
        own = dtype_code(array.dtype)
        self.code, self.bits = own[0] if code is None else code, own[1] if bits is None else bits
        self.lanes, self.ndim = lanes, len(self.shape) if ndim is None else ndim
        self.null_data, self.device_says = null_data, device_says or device
        self.null_shape, self.export_error = null_shape, export_error
        self.exported = self.deleted = 0

    def __dlpack_device__(self):
        return self.device_says

    def __dlpack__(self, *, stream=None, max_version=None, dl_device=None, copy=None):
        versioned = self.versioned and max_version is not None and max_version[0] >= 1
        return self.export(versioned)

    def export(self, versioned):
        if self.export_error is not None:
            raise self.export_error
        managed = ManagedVersioned() if versioned else Managed()
        tensor = managed.tensor
        tensor.data = None if self.null_data else self.array.ctypes.data - self.before
        tensor.byte_offset = self.before  # modulo 2^64
        tensor.device = Device(*self.device)
        tensor.ndim = self.ndim
        tensor.dtype = DataType(self.code, self.bits, self.lanes)
        shape = (ctypes.c_int64 * max(1, len(self.shape)))(*self.shape)
        strides = (ctypes.c_int64 * max(1, len(self.strides)))(*self.strides)
        if not self.null_shape:
            tensor.shape = ctypes.cast(shape, ctypes.POINTER(ctypes.c_int64))
        if not self.null_strides:
            tensor.strides = ctypes.cast(strides, ctypes.POINTER(ctypes.c_int64))
        address = ctypes.addressof(managed)

        @Deleter
        def deleter(pointer):
            # Popping twice would fail, but an exception in a callback is only printed: count.
            self.deleted += 1
            _alive.pop(pointer, None)

        managed.deleter = deleter
        if versioned:
            managed.version, managed.flags = Version(*self.version), self.flags
        _alive[address] = managed, shape, strides, deleter, self.array
        self.exported += 1
        return _api.PyCapsule_New(address, NAMES[versioned], _destroy_capsule)

    def check_released(self):
        assert self.deleted == self.exported, f"{self.exported} exports, {self.deleted} deleted"


class OldProducer(Producer):
    """A producer from before DLPack 1.0, which rejects max_version."""

    def __dlpack__(self, stream=None):
        return self.export(False)


class UsedCapsule(Producer):
    """Hands out one capsule again and again, as a buggy producer might."""

    capsule = None

    def __dlpack__(self, *, stream=None, max_version=None, dl_device=None, copy=None):
        if self.capsule is None:
            self.capsule = self.export(max_version is not None)
        return self.capsule


class NoCapsule(Producer):
    """Returns something that is no capsule."""

    def __dlpack__(self, *, stream=None, max_version=None, dl_device=None, copy=None):
        return 42
