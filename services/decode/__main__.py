"""`python -m services.decode [MODEL]`: one worker in the role `decode`, or colocated with `--role both`."""

import sys
from os import environ

from common.runtime.leave_process import leave_process
from common.runtime.worker_main import worker_main

if __name__ == "__main__":
    leave_process(worker_main(sys.argv[1:], environ, default_role="decode"))
