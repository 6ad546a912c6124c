"""From noise to latents: the grid of sigmas, the solvers, the guided loop over both experts."""
