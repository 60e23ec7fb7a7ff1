"""The systems that HaNoRec is compared with. MSRBench: msrbench.py."""
