"""`python -m isim`: what dvc.yaml runs, so that a copy of the project runs its own code."""

if __name__ == "__main__":
    try:
        from isim.cli import main
    except KeyboardInterrupt:
        # Ctrl-C in the first second; it comes to every process of a stage.
        raise SystemExit(130) from None
    main()
