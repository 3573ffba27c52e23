"""English words that name things, two at a time, such as "amber falcon". The sample model is trained on them."""

from __future__ import annotations

ADJECTIVES = """
amber ancient azure bitter blue bold brass brave bright broad broken bronze brown calm careful clever coastal
cobalt cold copper coral crimson curious dark deep distant dusty eager early eastern emerald empty fallen fast
fierce frozen gentle giant golden grand green grey hidden hollow honest humble iron ivory jade jolly keen large
late little lonely loud lucky marble mellow merry mighty misty narrow nimble noble northern pale patient plain
polar proud purple quick quiet rapid red royal ruby rusty sacred scarlet secret shiny silent silver simple
sleepy slender slow small smooth solid southern stormy strong sunny swift tall tiny velvet violet warm western
white wild wise wooden yellow young
""".split()

NOUNS = """
anchor apple arrow badger barrel basket beacon bear bell bison bridge bucket button cabin camel candle canyon
castle cedar chapel cherry circle cliff clock cloud comet compass cottage crane crown dolphin donkey dragon drum
eagle engine falcon feather fern ferry field fiddle finch flute forest fountain fox garden gate glacier goose
hammer harbor hawk heron hill horse island jaguar kettle kite ladder lake lamp lantern lemon lion lizard
lobster magnet maple meadow mirror moon moose mountain needle oak ocean orchard otter owl panda parrot pearl
pepper piano pigeon pillar planet plum pony rabbit raven river robin rocket salmon saddle sailor shadow shell
ship spider squirrel star stone swan temple thunder tiger tower trumpet tulip tunnel turtle valley violin wagon
walnut whale willow window wolf zebra
""".split()
