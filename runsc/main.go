// Command holdfast-runsc is gVisor's runsc, built from its Go module with nothing added: the sandbox that workloads run
// in. It is a module of its own, so that the rest of holdfast neither compiles gVisor nor shares its dependencies.
package main

import "gvisor.dev/gvisor/runsc/cli/maincli"

func main() { maincli.Main() }
