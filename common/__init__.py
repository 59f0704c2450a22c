"""What every script and every room uses. Standard library only, below everything else."""
