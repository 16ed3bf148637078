"""Settings of the simulated video app and of its rendered videos."""

from pydantic import Field

from gubs.section import Section


class NoiseSettings(Section):
    """Noise in the simulated app's implicit feedback. Rates are per sequential view, before filtering."""

    accidental_skip: float = Field(0.02, ge=0, le=1)
    """A slip of the thumb skips a video the user would have watched. True cause D."""
    app_exit: float = Field(0.02, ge=0, le=1)
    """The user leaves the app in the middle of a video."""
    interruption: float = Field(0.02, ge=0, le=1)
    """A phone call, for example: the video stops, and the next operation follows minutes later."""
    autoplay: float = Field(0.02, ge=0, le=1)
    """The video plays while nobody watches: a high play rate that means nothing."""
    wrong_tags: float = Field(0.06, ge=0, le=1)
    """Share of a user's listed tags that are not among the user's interests."""
    missing_tags: float = Field(0.2, ge=0, le=1)
    """Share of a user's interests that are not among the listed tags."""
    deviation: float = Field(0.15, ge=0, le=1)
    """How far users deviate from their archetype's interests and tolerances."""


class SyntheticSettings(Section):
    """The simulated video app, before filters. Preset `paper` starts with more, so that the paper's numbers are left:
    15,000 users (8,000 + 7,000), 25,000 videos, 933 K interactions.
    """

    users: int = Field(15000, ge=8)
    """Number of users (paper: 15,000 after filters)."""
    sequential_share: float = Field(8 / 15, ge=0, le=1)
    """Share of users with the sequential task; the others see pages (paper: 8,000 of 15,000)."""
    videos: int = Field(25000, ge=8)
    """Number of videos (paper: 25,000 after filters)."""
    popularity: float = Field(0.9, ge=0, le=3)
    """How unequal videos are: standard deviation of the logarithm of their popularity."""
    views_per_user: float = Field(40.0, gt=4)
    """Mean number of sequential views per user (paper: 320 K / 8,000)."""
    views_spread: float = Field(0.7, ge=0, le=2)
    """How unequal users' numbers of views are: standard deviation of their logarithm."""
    loyalty: float = Field(0.0, ge=0, le=1)
    """How far users who find less to skip have more views; 0 = not at all, 1 = strictly."""
    exposures_per_user: float = Field(87.6, gt=4)
    """Mean number of page exposures per user (paper: 613 K / 7,000)."""
    exposures_spread: float = Field(0.7, ge=0, le=2)
    """As `views_spread`, of the exposures."""
    page_size: int = Field(8, ge=2)
    """Videos per page."""
    topics: int = Field(24, ge=4, le=24)
    """Number of topics (each has its words and its look)."""
    archetypes: int = Field(12, ge=2, le=24)
    """Number of latent user groups."""
    flaw_rate: float = Field(0.13, ge=0, le=1)
    """Share of videos with a flaw (clickbait title, unpleasant picture, vulgar wording)."""
    finish: float = Field(0.22, ge=0, le=1)
    """Share of the views that are finished, among those that nothing ends early."""
    leave: float = Field(2.6, gt=0)
    """How early the others are left: the second parameter of a beta distribution, the larger the earlier."""
    click_interest: float = Field(0.34, ge=0, le=1)
    """Probability that a video is clicked whose title fits the user's interests, once it is noticed."""
    matched: float = Field(0.94, ge=0, le=1)
    """Share of recommendations that follow the listed tags; the others follow popularity."""
    days: int = Field(7, ge=1)
    """Length of the log in days (paper: 7)."""
    noise: NoiseSettings = NoiseSettings()


class RenderSettings(Section):
    """How the simulated app's videos are rendered."""

    size: int = Field(112, ge=32, le=1024, multiple_of=2)
    """Width and height in pixels."""
    fps: int = Field(4, ge=1, le=60)
    """Frames per second."""
    max_seconds: float = Field(20.0, gt=0)
    """Longer videos are cut to this length; their duration in the tables stays the same."""
