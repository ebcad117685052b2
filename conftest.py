"""One thread a process: the networks of the tests are small, and threads that wait for a busy core cost minutes."""
import os

os.environ["OMP_NUM_THREADS"] = "1"
