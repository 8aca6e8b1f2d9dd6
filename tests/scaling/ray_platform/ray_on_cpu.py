"""A vLLM platform for tests: CPU, whose workers Ray may place. vLLM's own CPU platform names no Ray resource.

Found by its entry point wherever this folder is on PYTHONPATH. The Ray cluster is started with as many logical GPUs as
there are to be workers; nothing looks for a real one.
"""


def platform():
    return "ray_on_cpu.RayOnCpuPlatform"


def __getattr__(name):
    if name != "RayOnCpuPlatform":
        raise AttributeError(name)
    from vllm.platforms.cpu import CpuPlatform

    class RayOnCpuPlatform(CpuPlatform):
        ray_device_key = "GPU"

        @classmethod
        def device_control_id_to_physical_device_id(cls, device_id):
            return int(device_id)

    return RayOnCpuPlatform
