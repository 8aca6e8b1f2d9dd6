"""tests/scaling/scaled.py on a Ray cluster of its own, in a network namespace that has only the loopback; same argv."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile


def main():
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    # Ray goes by the address of the host's name, which here is nobody's.
    with contextlib.suppress(OSError):
        for address in socket.gethostbyname_ex(socket.gethostname())[2]:
            if not address.startswith("127."):
                subprocess.run(["ip", "address", "add", f"{address}/32", "dev", "lo"], check=True)
    import ray

    # Ray's sockets need a short path.
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as folder:
        context = ray.init(num_gpus=2, num_cpus=4, include_dashboard=False, _temp_dir=folder)
        os.environ["RAY_ADDRESS"] = context.address_info["gcs_address"]
        from tests.scaling import scaled

        try:
            scaled.main(json.loads(sys.argv[1]))
        finally:
            ray.shutdown()


if __name__ == "__main__":
    main()
