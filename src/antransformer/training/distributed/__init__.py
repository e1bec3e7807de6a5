"""Data and tensor parallelism: process groups, FSDP2 sharding and detection of failed ranks."""
