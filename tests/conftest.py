from hypothesis import settings

settings.register_profile("no clock", deadline=None)  # a busy machine is not a wrong result
settings.load_profile("no clock")
