"""A fleet of one model and one device, whose engine is real."""

from fakes.fleets import NOW

from edgekit.cli.ota._serving import HostServing
from edgekit.ota.device import trust
from edgekit.ota.device.fetchers import FolderFetcher
from edgekit.ota.device.update import Device, update
from edgekit.ota.messages import Desired
from edgekit.ota.release import Limits
from edgekit.ota.server import publisher

CLASS = "x86-64"


class Home:
    """A fleet of one model, and one device, which is started anew by `start`."""

    def __init__(self, folder):
        self.fleet, self.state = folder / "fleet", folder / "state"
        publisher.init(self.fleet, NOW)
        trust.install_root(self.state, publisher.root(self.fleet))

    def publish(self, made, **limits):
        defaults = {"probation_requests": 5, "probation_seconds": 30.0}
        signed = Limits(**{**defaults, **limits})
        (release,) = publisher.publish(self.fleet, made, now=NOW, model="mlp", limits=signed)
        return release

    def start(self):
        serving = HostServing(CLASS, threads=1)
        return serving, Device("pi-1", CLASS, self.state, serving)

    def update(self, device, release):
        wish = Desired(deployment=f"d{release.version}", attempt=1, release=release.path, version=release.version)
        return update(device, wish, FolderFetcher(self.fleet / "repository"), NOW)
