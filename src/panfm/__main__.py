"""`python -m panfm`, which is also how torchrun starts a rank: `torchrun --nproc_per_node=2 -m panfm pretrain ...`."""

from panfm.cli.main import main

if __name__ == "__main__":
    main()
