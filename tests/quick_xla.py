"""What has XLA compile in two thirds of the time, for programs that run a few times."""

QUICK_XLA = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"


def xla_flags(devices: int) -> str:
    """Returns a value of `XLA_FLAGS` for so many devices of a CPU."""
    return f"{QUICK_XLA} --xla_force_host_platform_device_count={devices}"
