"""Sampling: sigmas and timesteps, solvers, and the denoising loop over both experts."""
