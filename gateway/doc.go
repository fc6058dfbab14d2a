// Package gateway brings the outside world to workloads without letting anything dial in.
package gateway
