package store

import (
	"context"
	"net"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"

	"holdfast/store/location"
)

// site is where a test's location is: a directory in this process, or a server that is spoken to over TLS.
type site interface {
	As(location.Rights) location.Location
	Scrub(ctx context.Context, rate int64) (location.Scrubbed, error)
	Close() error
}

const tlsVariable = "HOLDFAST_STORE_TLS"

func newSite(path string) (site, error) {
	if os.Getenv(tlsVariable) != "" {
		return newServed(path)
	}
	d, err := location.Open(location.Config{Path: path, Trusted: true})
	return near{d}, err
}

type near struct{ *location.Dir }

func (n near) As(r location.Rights) location.Location { return n.Dir.As(r) }

// served is a server, with a key for each set of rights.
type served struct {
	addr string
	pin  location.Pin
	stop func() error

	mu      sync.Mutex
	clients []*location.Client
}

func newServed(path string) (*served, error) {
	seed := location.Seed{9}
	cert, err := location.Certificate(seed)
	if err != nil {
		return nil, err
	}
	pin, err := location.PinOf(seed)
	if err != nil {
		return nil, err
	}
	st := location.Store{Name: "s"}
	for r := location.Rights(1); r <= everything; r++ {
		p, err := location.PinOf(location.Seed{1, byte(r)})
		if err != nil {
			return nil, err
		}
		st.Keys = append(st.Keys, location.Key{Pin: p, Rights: r})
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	s, err := location.NewServer(location.ServerConfig{Listener: l, Certificate: cert, Path: path, Stores: []location.Store{st}, Scrub: -1})
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	return &served{addr: l.Addr().String(), pin: pin, stop: sync.OnceValue(func() error { cancel(); return <-done })}, nil
}

// As is a client of its own, as another process would be.
func (s *served) As(r location.Rights) location.Location {
	cert, err := location.Certificate(location.Seed{1, byte(r)})
	if err != nil {
		panic(err)
	}
	c, err := location.NewClient(location.ClientConfig{Addr: s.addr, Pin: s.pin, Certificate: cert})
	if err != nil {
		panic(err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.clients = append(s.clients, c)
	return c
}

func (s *served) Scrub(context.Context, int64) (location.Scrubbed, error) {
	return location.Scrubbed{}, nil
}

func (s *served) Close() error {
	s.mu.Lock()
	for _, c := range s.clients {
		c.Close()
	}
	s.mu.Unlock()
	return s.stop()
}

// The tests that play an adversary or a fault, once more: over TLS, with servers for locations.
func TestOverTLS(t *testing.T) {
	if os.Getenv(tlsVariable) != "" {
		t.Skip("it is")
	}
	if testing.Short() {
		t.Skip("it takes long")
	}
	const tests = "TestLossUpToTheMargin|TestBeyondTheMargin|TestAMemberThatAnswersAfterFive|TestAnotherValidShard|TestWrongBytes|TestALiar|TestAMemberVanishes|" +
		"TestWithoutAQuorum|TestASpareTakes|TestDrainAndRemove|TestAReadGoesOn|TestDiscardAndSweep|TestSecretClass|TestRotation|TestRetain|TestManyAtOnce|" +
		"TestEverythingAcknowledged|TestOldFrontEnd|TestOldHeads|TestLiars|TestAnAcknowledged|TestNobodyStarts|TestAHeadWithout|TestWhatAThief|TestALocation|" +
		"TestAStoreWhose|TestTheFrontEndsDisk|TestCloseDoesNot|TestWhoAnswers|TestABlockThatWas"
	cmd := exec.Command(os.Args[0], "-test.run=^("+tests+")", "-test.v", "-test.short")
	cmd.Env = append(os.Environ(), tlsVariable+"=1")
	out, err := cmd.CombinedOutput()
	passed := strings.Count(string(out), "\n--- PASS")
	if err != nil || passed < 25 {
		t.Fatalf("%d tests passed: %v\n%s", passed, err, out)
	}
	t.Logf("%d tests passed", passed)
}
