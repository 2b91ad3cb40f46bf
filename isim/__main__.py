"""`python -m isim`: what dvc.yaml runs, so that a copy of the project runs its own code."""

from isim.cli import main

if __name__ == "__main__":
    main()
