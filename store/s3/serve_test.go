package s3

import (
	"context"
	"log/slog"
	"os"
	"os/signal"
	"syscall"
	"testing"
	"time"
)

// TestServeModel is no test: the servers that clients are played on start it, since versitygw serves once a process.
func TestServeModel(t *testing.T) {
	listen := os.Getenv("HOLDFAST_TEST_S3_LISTEN")
	if listen == "" {
		t.Skip("serves the model over HOLDFAST_TEST_S3_LISTEN")
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	patience, _ := time.ParseDuration(os.Getenv("HOLDFAST_TEST_S3_PATIENCE"))
	err := Run(ctx, Config{Patience: patience, Store: newModel(), Listen: listen, Access: os.Getenv("HOLDFAST_TEST_S3_ACCESS"), Secret: os.Getenv("HOLDFAST_TEST_S3_SECRET"), Log: slog.New(slog.NewTextHandler(os.Stderr, nil))})
	if err != nil {
		t.Fatal(err)
	}
}
