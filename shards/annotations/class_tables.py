"""Classes and colours of public data sets: facts that their authors publish."""

from dataclasses import dataclass

from shards.sample import Colour, Palette


@dataclass(frozen=True, slots=True)
class ClassTable:
    """Names and colours of the classes of a data set."""

    names: tuple[str, ...]
    colours: Palette
    ignored: tuple[Colour, ...] = ()
    """Colours of pixels that belong to no class."""


def parse_table(text: str) -> ClassTable:
    """Parse lines `name rrggbb`; a name in brackets is ignored."""
    rows = [line.strip().rsplit(" ", 1) for line in text.strip().splitlines()]
    parsed = [(name, parse_colour(code)) for name, code in rows]
    kept = [row for row in parsed if not row[0].startswith("[")]
    ignored = tuple(colour for name, colour in parsed if name.startswith("["))
    return ClassTable(tuple(n for n, _ in kept), tuple(c for _, c in kept), ignored)


def parse_colour(code: str) -> Colour:
    """Convert `rrggbb` to (R, G, B)."""
    red, green, blue = bytes.fromhex(code)
    return red, green, blue


VOC = parse_table(
    """
    background 000000
    aeroplane 800000
    bicycle 008000
    bird 808000
    boat 000080
    bottle 800080
    bus 008080
    car 808080
    cat 400000
    chair c00000
    cow 408000
    diningtable c08000
    dog 400080
    horse c00080
    motorbike 408080
    person c08080
    pottedplant 004000
    sheep 804000
    sofa 00c000
    train 80c000
    tvmonitor 004080
    [void] e0e0c0
    """
)
CITYSCAPES = parse_table(
    """
    road 804080
    sidewalk f423e8
    building 464646
    wall 66669c
    fence be9999
    pole 999999
    traffic light faaa1e
    traffic sign dcdc00
    vegetation 6b8e23
    terrain 98fb98
    sky 4682b4
    person dc143c
    rider ff0000
    car 00008e
    truck 000046
    bus 003c64
    train 005064
    motorcycle 0000e6
    bicycle 770b20
    [unlabeled] 000000
    [dynamic] 6f4a00
    [ground] 510051
    [parking] faaaa0
    [rail track] e6968c
    [guard rail] b4a5b4
    [bridge] 966464
    [tunnel] 96785a
    [caravan] 00005a
    [trailer] 00006e
    """
)
CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
"""Value in `labelIds` files of each of the 19 classes."""
CITYSCAPES_ALL = parse_table(
    """
    unlabeled 000000
    ego vehicle 000000
    rectification border 000000
    out of roi 000000
    static 000000
    dynamic 6f4a00
    ground 510051
    road 804080
    sidewalk f423e8
    parking faaaa0
    rail track e6968c
    building 464646
    wall 66669c
    fence be9999
    guard rail b4a5b4
    bridge 966464
    tunnel 96785a
    pole 999999
    polegroup 999999
    traffic light faaa1e
    traffic sign dcdc00
    vegetation 6b8e23
    terrain 98fb98
    sky 4682b4
    person dc143c
    rider ff0000
    car 00008e
    truck 000046
    bus 003c64
    caravan 00005a
    trailer 00006e
    train 005064
    motorcycle 0000e6
    bicycle 770b20
    """
)
"""The 34 labels, by their value in `labelIds` files."""
CAMVID = parse_table(
    """
    sky 808080
    building 800000
    pole c0c080
    road 804080
    pavement 3c28de
    tree 808000
    sign symbol c08080
    fence 404080
    car 400080
    pedestrian 404000
    bicyclist 0080c0
    [unlabelled] 000000
    """
)
"""The 11 classes of SegNet's version, by their value; 11 is unlabelled."""
CAMVID_COLOURS = parse_table(
    """
    Animal 408040
    Archway c00080
    Bicyclist 0080c0
    Bridge 008040
    Building 800000
    Car 400080
    CartLuggagePram 4000c0
    Child c08040
    Column_Pole c0c080
    Fence 404080
    LaneMkgsDriv 8000c0
    LaneMkgsNonDriv c00040
    Misc_Text 808040
    MotorcycleScooter c000c0
    OtherMoving 804040
    ParkingBlock 40c080
    Pedestrian 404000
    Road 804080
    RoadShoulder 8080c0
    Sidewalk 0000c0
    SignSymbol c08080
    Sky 808080
    SUVPickupTruck 4080c0
    TrafficCone 000040
    TrafficLight 004040
    Train c04080
    Tree 808000
    Truck_Bus c080c0
    Tunnel 400040
    VegetationMisc c0c000
    Wall 40c000
    [Void] 000000
    """
)
"""The colours of the original masks (`LabeledApproved_full`)."""
