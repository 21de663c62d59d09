"""What all tests share: virtual devices of the CPU, for what runs on many."""

import jax

# Before any test starts a backend. What does not ask for devices runs on the first, as ever.
jax.config.update("jax_num_cpu_devices", 8)
