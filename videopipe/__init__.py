"""What everything shares: records, partition, exchange, queue, scheduler, config, media."""

__version__ = "0.1.0"
