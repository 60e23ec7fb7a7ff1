"""The systems that HaNoRec is compared with, each as a row of one table."""
