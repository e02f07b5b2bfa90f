"""What holds for every test, in this process and in those it starts; set before torch is imported."""
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")     # models this small are slower on two threads, and many times so on a busy machine
os.environ.setdefault("TQDM_DISABLE", "1")
