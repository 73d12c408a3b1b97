"""The few JAX calls whose spelling depends on the version."""
