"""Print the CPU time in which 10,000 polygons of 500 points become an instance map of 6,200 px, on one core."""

import time

import numpy as np
from shapely import Polygon

from counterstain.io.regions import rasterise
from counterstain.seeding import numpy_generator

POLYGONS, POINTS, SIZE_PX = 10_000, 500, 6_200


def outline(number: int, radius_px: float) -> Polygon:
    rng = numpy_generator(0, "outline", number)
    angle = np.linspace(0, 2 * np.pi, POINTS, endpoint=False)
    lobes = sum(rng.normal() / k * np.sin(k * angle + rng.uniform(0, 6.3)) for k in range(2, 6))
    radius = radius_px * np.clip(1 + 0.2 * lobes, 0.3, 2)
    centre = rng.uniform(0, SIZE_PX, 2)
    return Polygon(centre + radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1))


def main() -> None:
    for radius_px in (30, 100, 300):
        instances = [(number, outline(number, radius_px)) for number in range(1, POLYGONS + 1)]
        start = time.process_time()
        painted = rasterise(instances, (SIZE_PX, SIZE_PX))
        seconds = time.process_time() - start
        print(
            f"{POLYGONS:,} polygons of {POINTS} points, radius about {radius_px} px, on {SIZE_PX:,} px: "
            f"{seconds:.1f} s, {len(np.unique(painted)) - 1:,} still show"
        )


if __name__ == "__main__":
    main()
