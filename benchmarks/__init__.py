"""What the pool costs, and what a rotation costs, measured against plain asyncpg: ``python -m benchmarks``."""
